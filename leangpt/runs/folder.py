"""out_dir: one run at a time, and no earlier run erased unasked.

A fresh run that finds another one in its out_dir moves that one aside whole, under the name of its
optimizer: out-shakespeare-char becomes out-shakespeare-char-adam, or -adam-2 where that is taken.
So several runs may share an out_dir, one after the other, and it always holds the newest.
"""

import contextlib
import json
import os
import re
from pathlib import Path

from leangpt.parallel.shards import remove_others
from leangpt.runs.checkpoint import (
    BEST,
    LAST,
    checkpoint_to_resume,
    load_checkpoint,
    remove_unnamed_shards,
)
from leangpt.runs.metrics import has_rows
from leangpt.runs.run import CONFIG, FACTS, METRICS
from leangpt.system.errors import UserError
from leangpt.system.lock import FolderLock

RUN_FILES = (LAST, BEST, METRICS, CONFIG, FACTS)


class RunFolder:
    """`with RunFolder(out_dir) as folder:` it is this process's until the end, or until it dies."""

    def __init__(self, out_dir: str | Path, writes: bool = True):
        """writes: False only looks, as the other processes of a run do."""
        self.path, self.writes = Path(out_dir), writes
        self._lock = None

    def __enter__(self):
        """Hold the folder if there is one. Raises UserError where another process does."""
        if self.writes and self.path.is_dir():
            self._lock = FolderLock(self.path)
        return self

    def __exit__(self, *exception):
        if self._lock is not None:
            self._lock.release()

    @property
    def resumable(self) -> bool:
        """Is there a checkpoint to go on from?"""
        return checkpoint_to_resume(self.path).is_file()

    @property
    def launch(self) -> str | None:
        """Which launch of torchrun's began the run in here (parallel/failures.py), if one did."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return json.loads((self.path / FACTS).read_text(encoding="utf-8")).get("launch")
        return None

    def resume(self) -> dict:
        """The latest checkpoint -> dict. Raises UserError where there is none or it is damaged."""
        if not self.resumable:
            raise UserError(
                f"nothing to resume: out_dir={str(self.path)!r} has no checkpoint yet; start the "
                "run with --init_from=scratch, or give --init_from=auto, which does either"
            )
        return load_checkpoint(checkpoint_to_resume(self.path))

    def begin(self, fresh: bool, overwrite: bool = False, keep: tuple = ()) -> str | None:
        """Make the folder ready for a run to write to -> a line on what that took, or None.

        fresh: not a run that was in here; then an older one is moved aside or, with `overwrite`,
        erased. keep: paths that must stay where they are. Raises UserError where another process
        holds the folder, or where it cannot be written or moved.
        """
        if not self.writes:
            return None
        if self._lock is None:
            self._lock = FolderLock(self.path)
        said = None
        if fresh and self._holds_run():
            said = self._erase() if overwrite else self._move_aside(keep)
        for name in RUN_FILES:  # what a killed process left half written
            for leftover in self.path.glob(f"{name}.*tmp"):
                leftover.unlink(missing_ok=True)
        remove_unnamed_shards(self.path)
        return said

    def _holds_run(self):
        return self.resumable or has_rows(self.path / METRICS)

    def _erase(self):
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)
        remove_others(self.path, set())
        return f"erased the earlier run in {self.path}"

    def _move_aside(self, keep):
        path = self.path.resolve()  # of a link its target moves: the new run is where it points
        for other in (Path.cwd(), *(Path(name).resolve() for name in keep)):
            if other == path or path in other.parents:
                raise UserError(
                    f"out_dir={str(self.path)!r} holds an earlier run, and {other} too, so it is "
                    "not moved aside: give another out_dir, or --overwrite=True to erase the run"
                )
        aside = _free_name(path, _variant(path))
        try:
            path.rename(aside)
        except OSError as error:
            raise UserError(
                f"out_dir={str(self.path)!r} holds an earlier run, which cannot be moved to "
                f"{aside} ({error.strerror}): give another out_dir, or --overwrite=True to erase it"
            ) from None
        self._lock.moved(aside)
        self._lock.release()
        self._lock = FolderLock(path)
        shortest = min(str(aside), os.path.relpath(aside), key=len)
        return f"moved the earlier run in {self.path} to {shortest}"


def _variant(path):
    """The optimizer of the run in a folder, for a folder's name."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        name = json.loads((path / CONFIG).read_text(encoding="utf-8"))["optimizer_variant"]
        if re.fullmatch(r"\w{1,40}", name):
            return name
    return "earlier"  # nanoGPT's, or damaged


def _free_name(path, ending):
    """The first of path-ending, path-ending-2, path-ending-3, ... that does not exist."""
    name, number = path.with_name(f"{path.name}-{ending}"), 1
    while name.exists() or name.is_symlink():
        number += 1
        name = path.with_name(f"{path.name}-{ending}-{number}")
    return name
