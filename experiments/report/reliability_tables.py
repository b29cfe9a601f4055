"""Tables of docs/results/reliability.md, from the rows of experiments/reliability/campaign.py."""

from experiments.reliability.book import GOOD
from experiments.report.table_tools import figure, made_on, markdown, table

PARTS = {
    "kills": "killed, then taken up again",
    "faults": "a system call fails",
    "damage": "a damaged file is read",
    "lines": "a command line drawn at random",
}


def last_rows(rows):
    """The last row of each case: what was found before a fix no longer counts."""
    return list({(row["part"], row["case"]): row for row in rows}.values())


def counts(rows):
    """Cells: cases; as if nothing had happened; ended in one line; bad ones."""
    same = sum(row["outcome"] in ("same", "done", "runs on") for row in rows)
    line = sum(row["outcome"] in ("refused", "stopped") for row in rows)
    bad = sum(row["outcome"] not in GOOD for row in rows)
    return f"{len(rows):,}", f"{same:,}", f"{line:,}", f"{bad:,}"


HEADER = ["cases", "ended well", "one line and a status", "not as it should be"]


@table("reliability", "reliability.csv")
def reliability(rows):
    rows = last_rows(rows)
    body = [
        [words, *counts([row for row in rows if row["part"] == part])]
        for part, words in PARTS.items()
    ]
    return markdown(["what happens", *HEADER], body) + made_on(rows)


@figure("reliability_cases", "reliability.csv")
def reliability_cases(rows):
    """How many cases ended as they should."""
    rows = last_rows(rows)
    right = sum(row["outcome"] in GOOD for row in rows)
    return f"{right:,} of {len(rows):,}"


@table("reliability_kinds", "reliability.csv")
def reliability_kinds(rows):
    rows, body = last_rows(rows), []
    for part in PARTS:
        of_part = [row for row in rows if row["part"] == part]
        for kind in sorted({str(row["kind"]) for row in of_part}):
            alike = [row for row in of_part if str(row["kind"]) == kind]
            body.append([f"{part}: {kind}", *counts(alike)])
    return markdown(["case", *HEADER], body)


@table("reliability_found", "reliability.csv")
def reliability_found(rows):
    """Every case that ever went wrong, by what it said, and whether it still does."""
    latest = {(row["part"], row["case"]): row for row in rows}
    found = {}
    for row in rows:
        if row["outcome"] not in GOOD:
            entry = found.setdefault((row["part"], row["kind"], row["outcome"]), set())
            entry.add((row["part"], row["case"]))
    body = [
        [
            f"{part}: {kind}",
            outcome,
            len(cases),
            sum(latest[c]["outcome"] not in GOOD for c in cases),
        ]
        for (part, kind, outcome), cases in found.items()
    ]
    return markdown(["case", "went wrong as", "cases", "still"], body or [["none", "-", 0, 0]], 2)
