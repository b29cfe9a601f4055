"""A few cases of each part of the campaign: none goes wrong."""

import pytest
from tiny_run import run_script

from experiments.reliability.book import GOOD, Book
from experiments.report.reliability_tables import reliability, reliability_found, reliability_kinds
from experiments.shared.common import read_csv


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, first, limit",
    [
        pytest.param("kills", 0, 6, marks=pytest.mark.campaign),
        ("kills", 1000, 2),
        pytest.param("faults", 0, 42, marks=pytest.mark.campaign),
        ("faults", 42, 10),
        pytest.param("damage", 0, 69, marks=pytest.mark.campaign),
        ("damage", 3450, 21),
        ("lines", 100, 40),
    ],
)
def test_nothing_is_lost_and_nothing_wrong_is_loaded(tmp_path, part, first, limit):
    flags = [f"--part={part}", f"--first={first}", f"--limit={limit}"]
    flags += [f"--csv={tmp_path / 'a.csv'}", f"--scratch={tmp_path / 'scratch'}"]
    done = run_script("-m", "experiments.reliability.campaign", *flags)
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "a.csv")
    assert len(rows) == limit
    assert [row for row in rows if row["outcome"] not in GOOD] == []


def test_a_case_that_was_run_again_counts_once(tmp_path):
    book = Book(tmp_path / "a.csv")
    origin = {"machine": "m", "torch": "2", "commit": "abc"}
    for case, outcome in ((0, "same"), (1, "traceback"), (2, "lost"), (1, "refused")):
        book.add({"part": "kills", "case": case, "kind": "plain", "outcome": outcome, **origin})
    assert {case: row["outcome"] for case, row in book.last("kills").items()} == {
        0: "same",
        1: "refused",
        2: "lost",
    }
    rows = read_csv(tmp_path / "a.csv")
    assert "| killed, then taken up again | 3 | 1 | 1 | 1 |" in reliability(rows)
    assert "| kills: plain | 3 | 1 | 1 | 1 |" in reliability_kinds(rows)
    found = reliability_found(rows)
    assert "| kills: plain | traceback | 1 | 0 |" in found
    assert "| kills: plain | lost | 1 | 1 |" in found
