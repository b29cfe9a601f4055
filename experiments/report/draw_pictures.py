"""Draw the pages' pictures from experiments/results/*.csv.

    python -m experiments.report.draw_pictures               rewrite docs/pictures/*.svg
    python -m experiments.report.draw_pictures --check=True  exit 1 if one is stale, change none

Each picture names the CSVs that it was drawn from and their hashes; stale means other hashes.
"""

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from configurator import parse_config
from experiments.report.attention_plots import scaling_figure, training_peak_figure
from experiments.report.memory_plots import memory_figure
from experiments.report.optimizer_plots import optimizer_figure
from experiments.report.plan_plots import accuracy_figure
from experiments.shared.common import RESULTS, ROOT, read_csv
from leangpt.system.errors import exit_cleanly
from leangpt.system.whole_files import written_whole

PICTURES = {  # file -> (what draws it, the CSVs whose rows it takes)
    "memory.svg": (memory_figure, "optimizer_memory.csv", "attention_gpu.csv"),
    "optimizers.svg": (optimizer_figure, "optimizer_quality_summary.csv"),
    "training_peak.svg": (training_peak_figure, "attention_scaling.csv"),
    "plan_accuracy.svg": (accuracy_figure, "plan_accuracy.csv"),
    "attention.svg": (lambda rows: scaling_figure(rows, "forward"), "attention_scaling.csv"),
}


@dataclass
class Settings:
    check: bool = False  # only say whether the pictures agree with the results
    folder: str = str(ROOT / "docs" / "pictures")


def source_of(name):
    """'optimizer_quality_summary.csv 1a2b...': the CSVs of a picture and their hashes."""
    _, *files = PICTURES[name]
    hashes = (hashlib.sha256((RESULTS / file).read_bytes()).hexdigest()[:16] for file in files)
    return ", ".join(f"{file} {digest}" for file, digest in zip(files, hashes))


def is_fresh(path):
    """Was the picture `path` drawn from the CSV as it is now?"""
    found = re.search(r"<dc:source>\s*(.*?)\s*</dc:source>", path.read_text(), re.DOTALL)
    return found is not None and found.group(1) == source_of(path.name)


def draw(path):
    function, *files = PICTURES[path.name]
    matplotlib.rcParams |= {"svg.hashsalt": path.name, "svg.fonttype": "none", "font.size": 11}
    figure = function(*(read_csv(RESULTS / file) for file in files))
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
            print(f"{path} is stale: run python -m experiments.report.draw_pictures")
        sys.exit(1)


if __name__ == "__main__":
    exit_cleanly(main)
