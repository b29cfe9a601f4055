"""Break it, thousands of times: kills, faults, damaged files, command lines, a CSV row a case.

    python -m experiments.reliability.campaign --part=kills --limit=200
    python -m experiments.reliability.campaign --part=all --again=True

A case is decided by its part and its number alone, so a campaign goes on where it was stopped, and
a case can be run again by its number. Everything lies in one scratch folder; one process at a time.
"""

import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

from configurator import parse_config
from experiments.reliability import command_lines, damage, faults, kills
from experiments.reliability.book import GOOD, Book
from experiments.reliability.world import World
from experiments.shared.common import RESULTS, provenance
from leangpt.system.errors import UserError, exit_cleanly

PARTS = {"kills": kills, "faults": faults, "damage": damage, "lines": command_lines}
REAL_EACH = 20  # every so many a case runs as a program of its own


@dataclass
class Settings:
    """How much of which part."""

    part: str = "all"  # kills | faults | damage | lines | all
    limit: int | None = None  # cases to run at most, of each part; None: all that are left
    first: int = 0  # number of the first case
    again: bool = False  # also run the cases again whose last outcome was bad
    csv: str = str(RESULTS / "reliability.csv")  # rows are appended to this file
    scratch: str | None = None  # a folder for everything else; None: a temporary one
    say: bool = False  # print bad cases as they come


def main(argv=None):
    settings, _ = parse_config(Settings, argv)
    if settings.part not in (*PARTS, "all"):
        raise UserError(f"unknown part {settings.part!r}: use {', '.join(PARTS)} or all")
    names = list(PARTS) if settings.part == "all" else [settings.part]
    # a shell starts `campaign &` with Ctrl-C ignored, and its children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "faults" in names:
        faults.load_before_everything_else()
    with tempfile.TemporaryDirectory() as temporary:
        world = World(Path(settings.scratch or temporary).absolute() / "world")
        book, origin = Book(settings.csv), provenance()
        for name in names:
            run_part(name, world, book, settings, origin)


def run_part(name, world, book, settings, origin):
    """Run a part's cases that have no row yet."""
    part, last = PARTS[name], book.last(name)
    numbers = [
        number
        for number in range(settings.first, part.count(world))
        if number not in last or settings.again and last[number]["outcome"] not in GOOD
    ]
    bad = 0
    for number in numbers[: settings.limit]:
        real = name != "faults" and number % REAL_EACH == REAL_EACH - 1
        row = {"part": name, "case": number, "real": int(real)}
        try:
            row |= part.case(number, world, real)
        except Exception as error:  # the campaign's own, or a command that fails undisturbed
            row |= {"outcome": "no case", "detail": f"{type(error).__name__}: {error}"[-300:]}
        book.add(row | origin)
        if row["outcome"] not in GOOD:
            bad += 1
            if settings.say:
                print(f"{name} {number}: {row}", flush=True)
    print(f"{name}: {len(numbers[: settings.limit])} cases, {bad} not as they should be")


if __name__ == "__main__":
    exit_cleanly(main)
