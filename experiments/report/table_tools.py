"""A registry of the pages' tables and figures, and how names and numbers are written in them."""

import re

TABLES, FIGURES = {}, {}  # name -> (function of the CSVs' rows, files under experiments/results/)


def table(name, *files, registry=TABLES):
    """Register a function: rows (list of dicts) of each of results/`files` -> Markdown."""

    def register(function):
        registry[name] = (function, files)
        return function

    return register


def figure(name, *files):
    """Register a function: rows of each of results/`files` -> a number in words, with its unit."""
    return table(name, *files, registry=FIGURES)


def markdown(header, rows, words=1):
    """A Markdown table; numbers belong to the right: all columns but the first `words`."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *rows])


def made_on(rows):
    """A line under a table that says what its rows were measured with: every commit of them.

    Raises LookupError where there are none.
    """
    if not rows:
        raise LookupError("no rows to show")
    machines, versions, commits = (
        list(dict.fromkeys(str(row[column]) for row in rows))
        for column in ("machine", "torch", "commit")
    )
    machines = [name.replace(", 1 threads", ", 1 thread") for name in machines]
    return (
        f"\n\n{' and '.join(machines)}; torch {' and '.join(versions)}; "
        f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."
    )


def row_with(rows, **values):
    """The first row that has these values. Raises StopIteration where there is none."""
    return next(row for row in rows if all(row[name] == value for name, value in values.items()))


# ---------------------------------------------------------------------- names

PUBLISHED = "adamsn:norm=sum+partition=larger+betas=(0.9,0.99)+nu1=1.0+role_rates={}"


def label(variant):
    """What tables and pictures call an optimizer: `name`, then its options in words.

    'adam:betas=(0.7,0.99)' -> '`adam`, betas 0.7 0.99'; a cell can be broken at every space.
    """
    if variant == PUBLISHED:
        return "AdamSN as published"
    name, _, options = variant.partition(":")
    words = [f"`{name}`"]
    for option in filter(None, re.split(r"\+(?=[a-z])", options)):
        key, _, value = option.partition("=")
        value = " ".join(re.findall(r"[^\s{}()',:]+", value)) or "none"
        words.append(f"{key} {value}")
    return ", ".join(words)


# ---------------------------------------------------------------------- numbers


def megabytes(value):
    return f"{value:,.0f} MB" if value >= 100 else f"{value:.3g} MB"


def seconds(value):
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"


def milliseconds(value):
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.2f} s"


def gigabytes(value):
    return f"{value:.2f} GB" if value < 10 else f"{value:.1f} GB"


def minutes(value):
    return f"{value // 60:.0f} min {value % 60:.0f} s"
