"""A registry of the README's tables and figures, and how numbers are written in them."""

TABLES, FIGURES = {}, {}  # name -> (function of the CSVs' rows, files under results/)


def table(name, *files, registry=TABLES):
    """Register a function: rows (list of dicts) of each of results/`files` -> Markdown."""

    def register(function):
        registry[name] = (function, files)
        return function

    return register


def figure(name, *files):
    """Register a function: rows of each of results/`files` -> a number in words, with its unit."""
    return table(name, *files, registry=FIGURES)


def markdown(header, rows):
    """A Markdown table; numbers belong to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
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
    return (
        f"\n\n{' and '.join(machines)}; torch {' and '.join(versions)}; "
        f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."
    )


def megabytes(value):
    return f"{value:,.0f} MB" if value >= 100 else f"{value:.3g} MB"


def seconds(value):
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"


def milliseconds(value):
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.2f} s"


def gigabytes(value):
    return f"{value:.2f} GB" if value < 10 else f"{value:.1f} GB"
