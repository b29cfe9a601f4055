"""Files that are written whole or not at all, and one clear line where they cannot be."""

import contextlib
import glob
import os
import secrets
import time
from pathlib import Path

from leangpt.system.errors import refused

ABANDONED = 3600.0  # seconds: a temporary file that nobody wrote to for so long is a dead process's


@contextlib.contextmanager
def written_whole(path, fsync=False):
    """`with written_whole(path) as temporary:` write that file (a Path); then it becomes `path`.

    Makes the folder. Whatever goes wrong leaves an older `path` as it was and no temporary file; a
    folder that cannot be written is a UserError, a full disk a RunError. Each writing has a
    temporary name of its own, so two processes that write the same file, of two machines perhaps,
    never mix: the later one counts. What a killed process left is removed an hour later.
    fsync: the file, and then its name, are on the disk before this returns, so that neither a power
    cut nor a later file can overtake it.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            yield temporary
            if fsync:
                sync(temporary)
            os.replace(temporary, path)
            if fsync:
                sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path):
    """Around whatever else writes to `path`: what the system refuses there is one clear line.

    But for a pipe's reader that went away, which is no error of the writer's: BrokenPipeError.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise refused(f"cannot write {path}", error) from error


def write_whole(path, content):
    """Make `path` hold `content` (bytes), whole or not at all, and on the disk."""
    with written_whole(path, fsync=True) as temporary:
        temporary.write_bytes(content)


def sync(path):
    """Wait until a file, or a folder's list of names, is on the disk. Raises OSError."""
    if os.name != "posix" and Path(path).is_dir():
        return  # Windows has no way to, and no need
    # Windows flushes only what may be written to
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_abandoned(path):
    for other in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process may be removing it too
            if time.time() - other.stat().st_mtime > ABANDONED:
                other.unlink()
