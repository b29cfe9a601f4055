"""Are the token files what was written? One reading answers for bit rot and for wrong ids.

meta.json holds the size and the sha256 of each .bin file. A small file is read when its data set is
opened; a large one while training goes on, since a run should not wait for gigabytes: the bytes are
read once, in order, by a thread that has nothing else to do. What it finds is raised by the next
batch, or by the end of the run, which waits for it. Files that nobody hashed (nanoGPT's own) are
read for ids beyond the vocabulary alone.
"""

import hashlib
import threading

import numpy as np

from leangpt.system.errors import UserError

AT_ONCE = 1 << 26  # bytes: such a file is read in a tenth of a second
CHUNK = 1 << 22  # bytes read at a time
TYPES = {"uint16": "<u2", "uint32": "<u4"}  # of a file's tokens
NO_LOSS = 1 << 31  # in a uint32: the token is read, and not to be predicted (chat_rows.py)


def digest_and_largest(path, dtype="uint16"):
    """(sha256 as hex, largest token) of a token file in one reading; (..., -1) if it is empty."""
    digest, largest = hashlib.sha256(), -1
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size = np.dtype(TYPES[dtype]).itemsize
            ids = np.frombuffer(chunk[: len(chunk) // size * size], dtype=TYPES[dtype])
            ids = ids if size == 2 else ids & (NO_LOSS - 1)
            largest = max(largest, int(ids.max(initial=0)))
    return digest.hexdigest(), largest


class TokenFileCheck:
    """Reads one token file to its end, now or beside the run, and knows what is wrong with it."""

    def __init__(self, path, vocab_size, sha256, remedy, dtype="uint16", large=True):
        """path: of a .bin file; sha256: what it should have, or None; remedy: what to do about it.
        large: False leaves a large file to another process.

        Raises UserError at once where the file is small enough to be read here.
        """
        self.path, self.vocab_size, self.sha256, self.remedy = path, vocab_size, sha256, remedy
        self.error, self.dtype = None, dtype
        self._thread = None
        if path.stat().st_size <= AT_ONCE:
            self._read()
            self.raise_if_wrong()
        elif large:
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()

    def _read(self):
        try:
            digest, largest = digest_and_largest(self.path, self.dtype)
        except OSError as error:
            self.error = f"{self.path} cannot be read: {error.strerror or error}"
            return
        if self.sha256 is not None and digest != self.sha256:
            self.error = (
                f"{self.path} is not what was prepared (its sha256 is {digest[:12]}..., meta.json "
                f"says {self.sha256[:12]}...): {self.remedy}"
            )
        elif largest >= self.vocab_size:
            self.error = (
                f"{self.path} holds token {largest} but the vocabulary has {self.vocab_size}: "
                f"{self.remedy}"
            )

    def raise_if_wrong(self):
        """Raise UserError for what has been found so far; cheap enough for every batch."""
        if self.error is not None:
            raise UserError(self.error)

    def wait(self, seconds=None):
        """Until the file has been read, or so many seconds -> has it been? Raises UserError where
        something is wrong with it."""
        if self._thread is not None:
            self._thread.join(seconds)
        self.raise_if_wrong()
        return self._thread is None or not self._thread.is_alive()
