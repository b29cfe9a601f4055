"""Write the tables and figures of README.md and docs/results/ from experiments/results/*.csv.

  python -m experiments.report.write_tables            rewrite every block and figure
  python -m experiments.report.write_tables --check=True  exit 1 if a page is stale, change none

A block is everything between `<!-- table: NAME -->` and `<!-- end table -->`, each alone on its
line; a figure in a sentence is `<!-- figure: NAME -->0.18<!-- end -->`. NAME is a function of one
of the *_tables.py beside this file, registered with the CSVs it reads; to add one, write one more
function. No measured number is typed by hand.

CommonMark ends a paragraph at a line that begins with an HTML comment, prints it literally, and
reads the next line anew ("16. A GPT" becomes a list): such a line is refused.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import parse_config
from experiments.report import (  # noqa: F401  each registers its tables
    attention_tables,
    backtest_tables,
    front_tables,
    generation_tables,
    memory_tables,
    optimizer_tables,
    plan_accuracy_tables,
    plan_ranks_tables,
    plan_tables,
    reliability_tables,
    scale_tables,
    tree_tables,
)
from experiments.report.table_tools import FIGURES, TABLES
from experiments.shared.common import RESULTS, ROOT, read_csv
from leangpt.system.errors import UserError, exit_cleanly
from leangpt.system.whole_files import written_whole

PAGES = ("README.md", "docs/ARCHITECTURE.md") + tuple(
    f"docs/results/{name}.md"
    for name in ("attention", "optimizers", "generation", "plan", "reliability", "scale")
)
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end table -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- figure: (\S+) -->).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Settings:
    check: bool = False  # only say whether the pages agree with the results
    pages: tuple[str, ...] = tuple(str(ROOT / name) for name in PAGES)  # the files
    results: str = str(RESULTS)  # folder of the CSV files


def rows_of(what, path):
    """The CSV `path`, which `what` needs. Raises UserError where it lacks."""
    if not path.exists():
        raise UserError(
            f"{what} needs {path}, which does not exist; run the script under "
            f"experiments/ that writes {path.name}"
        )
    rows = read_csv(path)
    if not rows:
        raise UserError(f"{what} needs {path}, which has no rows")
    return rows


def refuse_broken_paragraphs(text):
    """Raise UserError for a marker where CommonMark would end a sentence or swallow a table."""
    lines = ["", *text.split("\n"), ""]
    for number, line in enumerate(lines):
        start = line.lstrip()[:30]
        if start.startswith("<!--") and not re.fullmatch(r"<!-- (table: \S+|end table) -->", line):
            raise UserError(
                f"line {number}: a paragraph ends where a line begins with {start!r}...; "
                "put a word before it"
            )
        if start.startswith("<!-- table") and lines[number - 1].strip():
            raise UserError(f"line {number}: leave an empty line before {line!r}")


def rewrite(text, results):
    """A page's text with all blocks and figures made anew. Raises UserError for what cannot be."""
    refuse_broken_paragraphs(text)

    def made(kind, registry, name):
        if name not in registry:
            raise UserError(
                f"a page asks for a {kind} {name!r}; experiments/report knows: "
                f"{', '.join(sorted(registry))}"
            )
        function, files = registry[name]
        paths = [Path(results) / file for file in files]
        tables = [rows_of(f"{kind} {name!r}", path) for path in paths]
        try:
            return function(*tables)
        except (LookupError, StopIteration, ValueError) as error:  # no row, column; none to average
            raise UserError(
                f"{kind} {name!r} needs rows or columns that "
                f"{' or '.join(map(str, paths))} lacks ({error or 'no such row'}); "
                f"run the script under experiments/ that writes it"
            ) from error

    def block(match):
        opening, name, closing = match.groups()
        return f"{opening}{made('table', TABLES, name)}\n{closing}"

    def inline(match):
        opening, name, closing = match.groups()
        return f"{opening}{made('figure', FIGURES, name)}{closing}"

    return FIGURE.sub(inline, BLOCK.sub(block, text))


def main():
    settings, _ = parse_config(Settings)
    for page in settings.pages:
        refresh(Path(page), settings)


def refresh(page, settings):
    """Rewrite one file, or with --check exit 1 where it is stale."""
    if not page.exists():
        raise UserError(f"{page} does not exist")
    text = page.read_text()
    try:
        new = rewrite(text, settings.results)
    except UserError as error:
        raise UserError(f"{page.name}: {error}") from error
    if settings.check:
        if new != text:
            print(
                f"{page.name} is stale: run python -m experiments.report.write_tables",
                file=sys.stderr,
            )
            sys.exit(1)
        print(f"{page.name} agrees with {Path(settings.results).name}/")
    elif new != text:
        with written_whole(page) as temporary:
            temporary.write_text(new)
        print(f"rewrote {page}")


if __name__ == "__main__":
    exit_cleanly(main)
