"""Validation loss along a run, optimizer beside optimizer -> results/learning_curves.csv

    python data/shakespeare_char/prepare.py
    python -m experiments.optimizers.learning_curves

Each variant trains the small character model through train.py, with the rates that it has by
default, one seed each: `config/train_shakespeare_char.py` in float32, evaluated often, over the
whole validation split. One seed shows the shape of a curve; differences between optimizers are
optimizer_quality.py's. One row per variant and evaluation; rows of variants not run stay.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from configurator import parse_config
from experiments.shared.common import RESULTS, ROOT, provenance, read_csv, write_csv
from leangpt.runs.run import read_run
from leangpt.system.errors import UserError, exit_cleanly


@dataclass
class Settings:
    variants: tuple[str, ...] = ("adam", "adamsn8", "adafactor", "muonsn8", "muonsn0")
    config: str = "config/train_shakespeare_char.py"  # what they train
    options: str = ""  # more flags for train.py, as "--max_iters=10"
    eval_interval: int = 100  # iterations between evaluations
    seed: int = 1  # of weights and batches, the same for all
    threads: int = 2  # processor threads
    out: str = str(RESULTS / "learning_curves.csv")


def curve(settings, variant):
    """Train one variant -> a dict for each evaluation. Raises UserError where train.py fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "train.py", settings.config, *settings.options.split()),
            f"--optimizer_variant={variant}",
            f"--eval_interval={settings.eval_interval}",
            f"--seed={settings.seed}",
            *("--device=cpu", "--dtype=float32", "--compile=False"),
            f"--out_dir={folder}/run",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"train.py ended with status {done.returncode}: {done.stderr.strip()}")
        run = read_run(Path(folder) / "run")
    return [
        dict(variant=variant, seed=settings.seed, iteration=iteration, val_loss=round(loss, 4))
        for iteration, _, loss in run.evaluations
    ]


def main():
    settings, _ = parse_config(Settings)
    out = Path(settings.out)
    kept = read_csv(out) if out.exists() else []
    for variant in settings.variants:
        rows = [row | provenance() for row in curve(settings, variant)]
        kept = [row for row in kept if row["variant"] != variant] + rows
        write_csv(out, kept)
        print(f"{variant}: {rows[0]['val_loss']} -> {rows[-1]['val_loss']}", flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
