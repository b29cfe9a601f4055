"""Seconds of training until nanoGPT's own final loss at the seed setup, recipe against recipe.

    python data/shakespeare_char/prepare.py
    python -m experiments.optimizers.time_to_loss

nanoGPT's recipe (AdamW at 1e-3, float32, not compiled, 2000 iterations of 12 x 64 characters) ends
at a validation loss of 1.8857. Both sides train the same model through train.py, one after the
other and in turns, on the same machine: `config/demo_shakespeare_char.py` as it stands, and the
same file with nanoGPT's settings put back. The clock is train.py's: compilation counts, evaluation
does not. The loss is over the whole validation split. A side has arrived at the first evaluation
that is not above the target; one that never arrives took the seconds of its whole run.

Writes results/time_to_loss.csv: one row a run.
"""

import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import parse_config
from experiments.shared.common import RESULTS, ROOT, interleaved, provenance, write_csv
from leangpt.system.errors import UserError, exit_cleanly

NANOGPT = (
    "--optimizer_variant=adam",
    "--learning_rate=1e-3",
    "--min_lr=1e-4",
    "--weight_decay=0.1",
    "--beta1=0.9",
    "--beta2=0.99",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--warmup_iters=100",
    "--batch_size=12",
    "--block_size=64",
    "--optimizer_options=",
    "--dtype=float32",
    "--compile=False",
)


@dataclass
class Settings:
    config: str = "config/demo_shakespeare_char.py"  # our recipe
    options: str = ""  # more flags for our side, as "--compile=True --seed=1"
    target: float = 1.8857  # validation loss to reach
    eval_interval: int = 25  # iterations between our evaluations; seconds are known this finely
    nanogpt_eval_interval: int = 100  # and between nanoGPT's
    rounds: int = 3  # runs of each side, in turns, each with its own seed
    threads: int = 2  # processor threads of each run
    device: str = "cpu"  # train.py's
    out: str = str(RESULTS / "time_to_loss.csv")


def train_until(settings, flags, seed, eval_interval):
    """Run train.py until its validation loss reaches the target -> dict of what it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "train.py",
            settings.config,
            *flags,
            f"--seed={seed}",
            f"--eval_interval={eval_interval}",
            f"--device={settings.device}",
            "--log_interval=1000000",
            f"--out_dir={folder}",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            while process.poll() is None:
                time.sleep(0.5)
                if reached(evaluations(folder), settings.target):
                    process.send_signal(signal.SIGTERM)  # it saves and ends
                    process.wait()
        finally:
            if process.poll() is None:
                process.kill()
        rows = evaluations(folder)
        error = process.stderr.read().strip()
        if not rows:
            raise UserError(f"train.py did not start: {error.splitlines()[-1] if error else '?'}")
    row = reached(rows, settings.target)
    last = row or rows[-1]
    trained = [r for r in rows if int(r["iter"])]
    return dict(
        seed=seed,
        reached=bool(row),
        seconds=round(float(last["seconds"]), 2),
        iterations=int(last["iter"]),
        val_loss=float(last["val_loss"]),
        ms_per_iteration=round(1e3 * float(trained[-1]["seconds"]) / int(trained[-1]["iter"]), 2)
        if trained
        else None,
    )


def evaluations(folder):
    """Rows of metrics.csv that hold a validation loss, so far."""
    path = Path(folder) / "metrics.csv"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in csv.DictReader(lines) if row["val_loss"]]


def reached(rows, target):
    """The first row at or below the target, or None."""
    return next((row for row in rows if float(row["val_loss"]) <= target), None)


def median(values):
    """The middle one."""
    return sorted(values)[len(values) // 2]


def main():
    settings, _ = parse_config(Settings)
    if settings.rounds < 1:
        raise UserError(f"rounds must be at least 1, not {settings.rounds}")
    torch.set_num_threads(settings.threads)  # for the machine's description; train.py has its own
    seeds = {
        "ours": iter(range(1, settings.rounds + 1)),
        "nanoGPT": iter(range(1, settings.rounds + 1)),
    }
    flags = {"ours": settings.options.split(), "nanoGPT": list(NANOGPT)}
    every = {"ours": settings.eval_interval, "nanoGPT": settings.nanogpt_eval_interval}

    def contestant(side):
        def run():
            result = train_until(settings, flags[side], next(seeds[side]), every[side])
            print(
                f"{side:8s} seed {result['seed']}: val loss {result['val_loss']:.4f} after "
                f"{result['seconds']:.1f} s, {result['iterations']} iterations of "
                f"{result['ms_per_iteration']} ms",
                flush=True,
            )
            return result

        return run

    turns = interleaved([contestant(side) for side in flags], settings.rounds)
    results = dict(zip(flags, turns))
    rows = [
        dict(
            side=side,
            target=settings.target,
            threads=settings.threads,
            options=" ".join(flags[side]),
        )
        | result
        | provenance(settings.device)
        for side in flags
        for result in results[side]
    ]
    write_csv(settings.out, rows)
    seconds = {side: median([r["seconds"] for r in results[side]]) for side in flags}
    missed = [side for side in flags if not all(r["reached"] for r in results[side])]
    for side in missed:
        print(f"note: {side} did not reach {settings.target} in every run")
    print(
        f"median seconds to {settings.target}: ours {seconds['ours']:.1f}, nanoGPT "
        f"{seconds['nanoGPT']:.1f}: {seconds['nanoGPT'] / seconds['ours']:.1f} times sooner"
    )


if __name__ == "__main__":
    exit_cleanly(main)
