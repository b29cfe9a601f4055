"""Opening a prepared dataset and making batches of it; all that train.py knows about data.

folder.py describes the folder's files. nanoGPT's own folders load too: with its meta.pkl
(characters), or with neither meta file (GPT-2 BPE).
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from leangpt.system.errors import UserError
from leangpt.text.folder import (
    SPLITS,
    TOKEN_BYTES,
    check_whole,
    prepare_hint,
    read_meta,
    token_type,
)
from leangpt.text.integrity import NO_LOSS, TokenFileCheck
from leangpt.text.tokens import load_tokenizer


@dataclass(frozen=True)
class Dataset:
    """One prepared dataset; `train` and `val` are read-only memory maps of token ids (uint16, or
    uint32, where NO_LOSS marks what is not to be predicted)."""

    name: str
    directory: Path
    train: np.ndarray
    val: np.ndarray
    meta: dict
    checks: tuple[TokenFileCheck, ...] = ()  # of its files, perhaps still under way

    @property
    def vocab_size(self):
        """Number of different token ids."""
        return self.meta["vocab_size"]

    @property
    def source(self):
        """Where the text came from, in words."""
        return self.meta.get("source", "unknown")

    @property
    def sha256(self):
        """Hex digest of the prepared text, or None where the prepare script recorded none."""
        return self.meta.get("sha256")

    @property
    def row_tokens(self):
        """Tokens of a row, T + 1, where the files are rows of their own; None: one long text."""
        return self.meta.get("row_tokens")

    def split(self, name):
        """The token ids of split `name`: "train" or "val"."""
        if name not in ("train", "val"):
            raise UserError(f"unknown split {name!r}: use train or val")
        return getattr(self, name)

    def batch(self, split, batch_size, block_size, generator=None, device="cpu"):
        """Random windows or rows: x (B, T) and y (B, T), int64 on `device`, y being x one token on,
        -100 where no loss counts.

        Only `generator` (a CPU torch.Generator) decides which windows, so that a run's data order
        depends on nothing else. Raises UserError where the split is shorter than T + 1 tokens.
        """
        tokens = self._long_enough(split, block_size)
        rows = self.row_tokens
        last = len(tokens) // rows if rows else len(tokens) - block_size
        starts = torch.randint(last, (batch_size, 1), generator=generator).numpy()
        windows = tokens[starts * (rows or 1) + np.arange(block_size + 1)]  # (B, T + 1)
        return to_device(windows, device)

    def full_split_batches(self, split, block_size, batch_size, device="cpu"):
        """Yield (x, y), each (b, T) int64 with b <= B, over the whole split in order.

        Blocks of T tokens follow one another without overlap; every block weighs the same, so a
        mean over blocks is the split's loss. The last batch may have fewer rows, and fewer than
        T + 1 tokens at the very end are left out.
        """
        tokens, blocks = self.split(split), self.block_count(split, block_size)
        stride = self.row_tokens or block_size
        for first in range(0, blocks, batch_size):
            starts = np.arange(first, min(first + batch_size, blocks))[:, None] * stride
            yield to_device(tokens[starts + np.arange(block_size + 1)], device)

    def block_count(self, split, block_size):
        """Blocks of T tokens, and the one after each, that lie side by side in a split."""
        tokens, rows = self._long_enough(split, block_size), self.row_tokens
        return len(tokens) // rows if rows else (len(tokens) - 1) // block_size

    def check_block_size(self, block_size):
        """Raise UserError where a split has no block of T tokens and the one after them."""
        for split in ("train", "val"):
            self._long_enough(split, block_size)

    def checked(self, seconds=0.0):
        """Have large files been read to their ends, now or within so many seconds each?

        Raises UserError where one is not what was prepared.
        """
        return all([check.wait(seconds) for check in self.checks])

    def tokenizer(self):
        """The tokenizer this dataset was prepared with."""
        return load_tokenizer(self)

    def _long_enough(self, split, block_size):
        for check in self.checks:
            check.raise_if_wrong()
        tokens = self.split(split)
        if self.row_tokens and block_size != self.row_tokens - 1:
            raise UserError(
                f"{self.name} is rows of {self.row_tokens - 1} tokens: set "
                f"block_size={self.row_tokens - 1}, not {block_size}, or prepare it again"
            )
        if len(tokens) <= block_size:
            raise UserError(
                f"the {split} split of {self.name} has {len(tokens)} tokens, too few for "
                f"block_size={block_size}: lower block_size or prepare more text"
            )
        return tokens


def load_dataset(name, data_dir="data", read_large=True):
    """Open the dataset in `data_dir/name`.

    read_large: False where another process of this machine reads large files to their ends.

    Raises UserError where it is not prepared (naming the command that prepares it), where its
    files disagree with one another or with what was written, or where a token id lies outside the
    vocabulary. A large file is read to its end beside the run: a batch then raises, or `checked`.
    """
    directory = Path(data_dir) / name
    check_whole(directory)
    if not (directory / "meta.json").exists():  # a file that is missing is the better hint
        for split in SPLITS:
            _open_tokens(directory, split)
    meta = read_meta(directory)
    splits = [_open_tokens(directory, split, token_type(meta)) for split in SPLITS]
    hint = prepare_hint(directory)
    checks = []
    for split, tokens in zip(SPLITS, splits):
        path = directory / f"{split}.bin"
        expected = meta.get(f"{split}_tokens", len(tokens))
        if len(tokens) != expected:
            raise UserError(
                f"{path} holds {len(tokens)} tokens but meta.json says {expected}: {hint}"
            )
        if len(tokens) % meta.get("row_tokens", 1):
            raise UserError(f"{path} is no rows of {meta['row_tokens']} tokens: {hint}")
        digest = meta.get("files", {}).get(path.name, {}).get("sha256")
        facts = (meta["vocab_size"], digest, hint, token_type(meta))
        checks.append(TokenFileCheck(path, *facts, read_large))
    return Dataset(name, directory, *splits, meta, tuple(checks))


def read_tokens(path, dtype="uint16"):
    """A .bin file as a read-only memory map (an empty array for an empty file)."""
    if os.path.getsize(path) == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _open_tokens(directory, split, dtype="uint16"):
    path = directory / f"{split}.bin"
    if not path.is_file():
        raise UserError(f"{path} is missing: {prepare_hint(directory)}")
    if os.path.getsize(path) % TOKEN_BYTES[dtype]:
        odd = "an odd number of bytes" if dtype == "uint16" else "bytes that are no multiple of 4"
        raise UserError(f"{path} has {odd}, so it is not {dtype}: {prepare_hint(directory)}")
    return read_tokens(path, dtype)


def to_device(windows, device):
    """(B, T + 1) uint16 or uint32 -> x (B, T), y (B, T), int64, y -100 where NO_LOSS is set.

    Copied without waiting where that helps.
    """
    marked = windows.dtype == np.uint32
    windows = torch.from_numpy(windows.astype(np.int64))
    x, y = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    if marked:
        x, y = x & (NO_LOSS - 1), y.masked_fill(y >= NO_LOSS, -100)
    if torch.device(device).type == "cuda":
        return (
            x.pin_memory().to(device, non_blocking=True),
            y.pin_memory().to(device, non_blocking=True),
        )
    return x.to(device), y.to(device)


def describe(dataset):
    """One line for a script's start-up summary."""
    digest = f", sha256 {dataset.sha256[:12]}" if dataset.sha256 else ""
    rows = f" in rows of {dataset.row_tokens - 1}" if dataset.row_tokens else ""
    return (
        f"{dataset.name}: {len(dataset.train):,} train and {len(dataset.val):,} val tokens{rows}, "
        f"vocabulary {dataset.vocab_size}, from {dataset.source}{digest}"
    )
