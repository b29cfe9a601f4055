"""Which runs come next: a function of the rows that are there, and of nothing else.

Tuning, entrant by entrant: the grid, its middle first; then neighbours of the best at twice and
half of either rate, until the best has been compared with all four; then the other beta2 and the
other weight decay at the best rates. A run that diverged counts as an infinite loss. Finals: the
three best settings of the tuning, then further seeds of the best of these.
"""

import math
from dataclasses import dataclass, fields, replace

from experiments.scale.entrants import ENTRANTS, OTHER_BETA2, OTHER_WEIGHT_DECAY

FINALISTS = 3


@dataclass(frozen=True)
class Run:
    """One training run of the comparison: the columns that name it."""

    stage: str  # tune | final
    entrant: str
    learning_rate: float
    embedding_lr: float
    weight_decay: float
    beta2: float
    seed: int


NAMES = tuple(field.name for field in fields(Run))


def run_of(row):
    """The Run that a row of the table was."""
    kinds = {field.name: field.type for field in fields(Run)}
    return Run(**{name: kinds[name](row[name]) for name in NAMES})


def loss_of(row):
    """The row's final validation loss, infinite where the run came to no end of its own."""
    return math.inf if row["val_loss"] in (None, "") else float(row["val_loss"])


def tuning(entrant, rows, seed=1):
    """The tuning runs of an entrant that can be made now, given its rows: a list, best first.

    Empty once its search is finished. rows: of this protocol, of any entrants.
    """
    losses = {
        run_of(row): loss_of(row)
        for row in rows
        if row["stage"] == "tune" and row["entrant"] == entrant
    }
    each = ENTRANTS[entrant]
    start = Run("tune", entrant, 0.0, 0.0, each.weight_decay, each.beta2, seed)
    grid = [
        replace(start, learning_rate=rate, embedding_lr=embedding)
        for rate in _middle_first(each.rates)
        for embedding in each.embedding_rates
    ]
    missing = [run for run in grid if run not in losses]
    if missing:
        return missing
    same = {
        run: loss
        for run, loss in losses.items()
        if (run.weight_decay, run.beta2, run.seed) == (each.weight_decay, each.beta2, seed)
    }
    best = min(same, key=same.get)
    if not math.isfinite(same[best]):
        return []  # it trains nowhere: nothing to go on from
    missing = [run for run in neighbours(best) if run not in losses]
    if missing:
        return missing
    others = [replace(best, beta2=OTHER_BETA2), replace(best, weight_decay=OTHER_WEIGHT_DECAY)]
    return [run for run in others if run not in losses]


def _middle_first(rates):
    centre = (len(rates) - 1) / 2
    return sorted(rates, key=lambda rate: abs(rates.index(rate) - centre))


def neighbours(run):
    """The four runs at twice and at half of either rate."""
    return [
        replace(run, **{name: _rounded(getattr(run, name) * factor)})
        for name in ("learning_rate", "embedding_lr")
        for factor in (2, 0.5)
    ]


def _rounded(rate):
    """So that a rate reached by two ways is one number."""
    return float(f"{rate:.6g}")


def finals(entrant, rows, seeds, early=False):
    """The full-length runs of an entrant that can be made now: the best three of the tuning, then
    seeds 2 ... `seeds` of the best of these. Empty where all are made, or its tuning is not
    finished and `early` is False."""
    if tuning(entrant, rows) and not early:
        return []
    tuned = [
        row
        for row in rows
        if row["stage"] == "tune" and row["entrant"] == entrant and math.isfinite(loss_of(row))
    ]
    finalists = [
        replace(run_of(row), stage="final") for row in sorted(tuned, key=loss_of)[:FINALISTS]
    ]
    losses = {
        run_of(row): loss_of(row)
        for row in rows
        if row["stage"] == "final" and row["entrant"] == entrant
    }
    missing = [run for run in finalists if run not in losses]
    if missing or not finalists:
        return missing
    best = min(finalists, key=losses.get)
    more = [replace(best, seed=seed) for seed in range(2, seeds + 1)]
    return [run for run in more if run not in losses]
