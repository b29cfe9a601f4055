"""The campaign's results: a row a case, appended as soon as the case is over.

A case that was run again, after something was fixed, has several rows: the last one counts.
"""

import csv
import os
from pathlib import Path

from experiments.shared.common import read_csv

GOOD = ("same", "done", "refused", "stopped", "runs on", "unchecked")
COLUMNS = (
    "part",
    "case",
    "kind",
    "what",
    "outcome",  # one of GOOD, or what must not be
    "status",
    "seconds",
    "real",  # 1: a program of its own, 0: forked
    "detail",
    "machine",
    "torch",
    "commit",
)


class Book:
    """A CSV file that grows by a row a case."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append([COLUMNS])

    def add(self, row: dict) -> None:
        """Write a row, which names columns."""
        cells = [" ".join(str(row.get(name, "")).split()) for name in COLUMNS]
        # drawn cells may hold any character; a CSV with a NUL is no text
        self._append([["".join(c if c.isprintable() else "?" for c in cell) for cell in cells]])

    def last(self, part: str) -> dict[int, dict]:
        """Case number -> its last row."""
        rows = read_csv(self.path)
        return {row["case"]: row for row in rows if row["part"] == part}

    def _append(self, rows):
        with open(self.path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
            file.flush()
            os.fsync(file.fileno())
