"""Draw the README's pictures from results/*.csv.

    python -m experiments.report.readme_pictures               rewrite docs/*.svg
    python -m experiments.report.readme_pictures --check=True  exit 1 if one is stale, change none

Each picture names the CSV that it was drawn from and that file's hash; stale means another hash.
"""

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from configurator import parse_config
from experiments.report.plots import larger_optimizer_figure, optimizer_figure, scaling_figure
from experiments.shared.common import RESULTS, ROOT, read_csv
from leangpt.system.errors import exit_cleanly
from leangpt.system.whole_files import written_whole

PICTURES = {  # file -> (its CSV, what draws it)
    "attention.svg": ("attention_scaling.csv", lambda rows: scaling_figure(rows, "forward")),
    "optimizers.svg": ("optimizer_quality_summary.csv", optimizer_figure),
    "optimizers_larger.svg": ("optimizer_quality_summary.csv", larger_optimizer_figure),
}


@dataclass
class Settings:
    check: bool = False  # only say whether the pictures agree with results/
    folder: str = str(ROOT / "docs")


def source_of(name):
    """'optimizer_quality_summary.csv 1a2b...': the CSV of a picture and its hash."""
    file = PICTURES[name][0]
    return f"{file} {hashlib.sha256((RESULTS / file).read_bytes()).hexdigest()[:16]}"


def is_fresh(path):
    """Was the picture `path` drawn from the CSV as it is now?"""
    found = re.search(r"<dc:source>\s*(.*?)\s*</dc:source>", path.read_text(), re.DOTALL)
    return found is not None and found.group(1) == source_of(path.name)


def draw(path):
    file, function = PICTURES[path.name]
    matplotlib.rcParams |= {"svg.hashsalt": path.name, "svg.fonttype": "none", "font.size": 11}
    figure = function(read_csv(RESULTS / file))
    with written_whole(path) as temporary:
        metadata = {"Date": None, "Source": source_of(path.name)}
        figure.savefig(temporary, format="svg", metadata=metadata)


def main():
    settings, _ = parse_config(Settings)
    matplotlib.use("agg")
    paths = [Path(settings.folder) / name for name in PICTURES]
    if not settings.check:
        for path in paths:
            draw(path)
            print(f"drew {path}")
    elif stale := [path for path in paths if not path.exists() or not is_fresh(path)]:
        for path in stale:
            print(f"{path} is stale: run python -m experiments.report.readme_pictures")
        sys.exit(1)


if __name__ == "__main__":
    exit_cleanly(main)
