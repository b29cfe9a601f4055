"""What the measuring scripts share: where results go, how a table is written, interleaved runs.

A script under experiments/ imports this file and writes results/<its own name>.csv, beside it.
It runs as a module from the repository's root: python -m experiments.attention.attention_scaling

Every row ends with the commit that made it. A machine with a mere copy is told which one:

    LEANGPT_COMMIT=$(git rev-parse --short HEAD)     where the copy comes from; then there
    LEANGPT_COMMIT=1a2b3c4 python -m experiments.attention.attention_gpu
"""

import csv
from pathlib import Path

from leangpt.system.whole_files import written_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
HASHES = ("commit", "sha256", "protocol", "data")  # columns


def provenance(device="cpu"):
    """Columns every measured row ends with: machine, torch version, commit."""
    import torch  # here, so that what only reads results does not wait for it

    from leangpt.system.timing import commit_id, describe_machine

    return {"machine": describe_machine(device), "torch": torch.__version__, "commit": commit_id()}


def write_csv(path, rows):
    """Write rows (dicts with the same keys) to `path`, whole or not at all: else a UserError."""
    with written_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """Rows of a CSV as dicts; what reads as a number is one, an empty field is None.

    Hashes stay text: 5465686, 0123456 and 12e4567 are commits too.
    """
    with Path(path).open(newline="") as file:
        return [
            {name: text if name in HASHES and text else _number(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def _number(text):
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def interleaved(functions, rounds):
    """Call every function once a round -> a list of results for each of them.

    A machine that slows down for a while then slows every contestant, not the last one alone.
    """
    results = [[] for _ in functions]
    for _ in range(rounds):
        for function, found in zip(functions, results):
            found.append(function())
    return results
