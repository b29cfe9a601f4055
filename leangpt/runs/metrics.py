"""metrics.csv: a row a report and a row an evaluation, whole whatever interrupts the run."""

import contextlib
import csv
import os
from pathlib import Path

from leangpt.system.errors import UserError, refused
from leangpt.system.whole_files import writing, written_whole

# One row an iteration logged (loss: that iteration's batch, before its update), one an evaluation
# (train_loss, val_loss); a cell that does not apply is empty. peak_mb: the exact peak of a training
# step. seconds: spent training so far, without evaluations and saves.
COLUMNS = (
    "iter",
    "tokens",
    "loss",
    "train_loss",
    "val_loss",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "ms",
    "peak_mb",
    "seconds",
)


class MetricsFile:
    """A header and rows of COLUMNS, each on the disk's queue as soon as written.

    A resumed run first drops the rows that its checkpoint does not know of, so the file reads as if
    nothing had been interrupted.
    """

    def __init__(self, path: str | Path, first_iteration: int = 0):
        """Start anew, or keep what came before `first_iteration` if that is not 0."""
        kept = _rows_before(path, first_iteration) if first_iteration else []
        with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kept])
        with writing(path):
            self.file = open(path, "a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, lineterminator="\n")

    def write(self, **cells):
        """One row, its cells by column. Raises RunError where the disk is full."""
        with writing(self.file.name):
            self.writer.writerow(cells)
            self.file.flush()

    def sync(self):
        """Before a checkpoint: its rows must not be lost where the checkpoint is not."""
        with writing(self.file.name):
            os.fsync(self.file.fileno())

    def close(self):
        """Also where a row could not be written: that was said."""
        with contextlib.suppress(OSError):
            self.file.close()


def has_rows(path: str | Path) -> bool:
    """Is there a metrics.csv that says more than its header?"""
    try:
        with open(path, "rb") as file:
            return file.readline() != b"" and file.readline() != b""
    except OSError:
        return False


def _rows_before(path, iteration):
    """Whole rows of an earlier metrics.csv whose iteration is below `iteration`."""
    if not Path(path).exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n")]  # a kill can cut the last one
        rows = [row for row in csv.reader(lines) if len(row) == len(COLUMNS)]
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): move it away to go on without it") from None
    return [row for row in rows if row[0].isdecimal() and int(row[0]) < iteration]
