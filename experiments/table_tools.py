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


def made_on(row):
    """A line under a table that says what it was measured with."""
    return f"\n\n{row['machine']}; torch {row['torch']}; commit {row['commit']}."


def megabytes(value):
    return f"{value:,.0f} MB" if value >= 100 else f"{value:.3g} MB"


def seconds(value):
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"


def gigabytes(value):
    return f"{value:.2f} GB" if value < 10 else f"{value:.1f} GB"
