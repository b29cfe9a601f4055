"""A real model fine-tuned on real text: what each optimizer's bytes cost in loss and in forgetting.

    python data/prepare_text.py --input new.txt --name new --tokenizer data/smollm2
    python data/prepare_text.py --input old.txt --name old --tokenizer data/smollm2
    python -m experiments.scale.finetune --model=data/smollm2 --dataset=new --other=old

Each side runs train.py at every rate with seed 1; its best rate is run with the other seeds. While
the best rate is the smallest or largest, one a factor of 2 beyond is run too. The loss is the last
one over the whole validation split; forgetting is how much the loss on --other's has grown.
LoRA, which needs another trainer, is not among the sides.

Writes a row a run to results/finetune.csv; runs that are there are not made again.
"""

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from configurator import parse_config
from experiments.shared.common import RESULTS, ROOT, provenance, read_csv, write_csv
from experiments.shared.paired import mean_interval
from leangpt.system.errors import RunError, UserError, exit_cleanly

LOW, FUSED = "--param_dtype=bfloat16", "--optimizer_options=fused_backward=True"
SIDES = {  # name: (bytes per parameter of weights, gradients and state; flags)
    "adamw_float32": (16, ("--optimizer_variant=adam",)),
    "adamsn8_5": (5.1, (LOW, "--optimizer_variant=adamsn8")),
    "adamsn8_3": (3.1, (LOW, "--optimizer_variant=adamsn8", FUSED)),
    "muonsn8_3": (3.1, (LOW, "--optimizer_variant=muonsn8", FUSED)),
    "muonsn4_2.6": (2.6, (LOW, "--optimizer_variant=muonsn4", FUSED)),
}
KEYS = ("side", "learning_rate", "seed", "iterations", "dataset")


@dataclass
class Settings:
    model: str = "data/smollm2"  # what is fine-tuned: as train.py's init_from
    dataset: str = "new"  # what it is to learn
    other: str = "old"  # what it may forget
    data_dir: str = "data"  # where both are
    sides: str = ",".join(SIDES)  # by commas
    rates: str = "1e-5,2e-5,4e-5,8e-5"  # of linear weights; everything else has a tenth
    seeds: int = 3  # of the best rate
    iterations: int = 200  # of each run
    batch_size: int = 8  # sequences an iteration
    block_size: int = 1024  # tokens a sequence
    device: str = "auto"  # auto | cpu | cuda
    out: str = str(RESULTS / "finetune.csv")  # rows are added to this file

    def __post_init__(self):
        if unknown := set(self.sides.split(",")) - set(SIDES):
            raise UserError(f"unknown sides {', '.join(sorted(unknown))}: {', '.join(SIDES)}")
        if self.seeds < 1 or not [float(rate) for rate in self.rates.split(",")]:
            raise UserError("seeds must be at least 1, and rates one number or more")


def train(settings, *flags):
    """Run train.py -> what it printed. Raises RunError where it failed otherwise than by a loss."""
    command = [
        sys.executable, "train.py", f"--data_dir={Path(settings.data_dir).resolve()}",
        f"--device={settings.device}", "--eval_iters=0", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode not in (0, 1):
        raise RunError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return done.stdout


def val_losses(text):
    """The validation losses that a run printed, in order."""
    return [float(found) for found in re.findall(r"val loss ([\d.]+)", text)]


def run(settings, side, rate, seed, place):
    """One run -> its row; a loss of inf where it diverged."""
    shape = [f"--batch_size={settings.batch_size}", f"--block_size={settings.block_size}"]
    shape += ["--gradient_accumulation_steps=1"]
    start = [f"--init_from={settings.model}", *shape, "--eval_only=True"]
    folder = place / f"{side}-{rate:g}-{seed}"
    before = val_losses(train(settings, *start, f"--dataset={settings.other}"))[-1]
    began = time.perf_counter()
    said = train(
        settings, f"--init_from={settings.model}", *shape, *SIDES[side][1], f"--seed={seed}",
        f"--dataset={settings.dataset}", f"--out_dir={folder}", "--eval_interval=0",
        f"--max_iters={settings.iterations}", f"--warmup_iters={settings.iterations // 10}",
        f"--learning_rate={rate:g}", f"--embedding_lr={rate / 10:g}", "--log_interval=1",
    )  # fmt: skip
    seconds = time.perf_counter() - began
    rows = [row for row in read_csv(folder / "metrics.csv") if row["loss"] is not None]
    ends, after = val_losses(said), None
    if len(rows) >= settings.iterations:
        resumed = ["--init_from=resume", f"--out_dir={folder}", "--eval_only=True"]
        after = val_losses(train(settings, *resumed, f"--dataset={settings.other}"))[-1]
    return dict(
        side=side,
        bytes=SIDES[side][0],
        learning_rate=rate,
        seed=seed,
        iterations=settings.iterations,
        dataset=settings.dataset,
        val_loss=ends[-1] if after is not None else float("inf"),
        forgotten=None if after is None else round(after - before, 6),
        peak_gb=max((row["peak_mb"] or 0) for row in rows) / 1000 if rows else None,
        tokens_per_s=rows[-1]["tokens_per_s"] if rows else None,
        wall_s=round(seconds, 1),
        **provenance("cpu" if settings.device == "cpu" else "cuda"),
    )


def wanted(settings, side, rows):
    """The next (rate, seed) of a side, or None when it is finished."""
    mine = {
        (row["learning_rate"], row["seed"]): row["val_loss"]
        for row in rows
        if (row["side"], row["iterations"], row["dataset"])
        == (side, settings.iterations, settings.dataset)
    }
    rates = [float(rate) for rate in settings.rates.split(",")]
    for rate in rates:
        if (rate, 1) not in mine:
            return rate, 1
    tried = sorted(rate for rate, seed in mine if seed == 1)
    best = min(tried, key=lambda rate: mine[rate, 1])
    if len(rates) > 1 and len(tried) < len(rates) + 4:
        if best == tried[0]:
            return best / 2, 1
        if best == tried[-1]:
            return best * 2, 1
    for seed in range(2, settings.seeds + 1):
        if (best, seed) not in mine:
            return best, seed
    return None


def summary(rows):
    """A line a side: its best rate, loss, forgetting, peak."""
    lines = []
    for side in dict.fromkeys(row["side"] for row in rows):
        mine = [row for row in rows if row["side"] == side]
        best = min((r for r in mine if r["seed"] == 1), key=lambda r: r["val_loss"])
        same = [row for row in mine if row["learning_rate"] == best["learning_rate"]]
        mean, half = mean_interval([row["val_loss"] for row in same])
        lines.append(
            f"{side:<14} {best['bytes']:>5} bytes, rate {best['learning_rate']:g}, "
            f"{len(same)} seeds: loss {mean:.4f} ± {half:.4f}, forgotten {best['forgotten']}, "
            f"{best['peak_gb']} GB"
        )
    return "\n".join(lines)


def main(argv=None):
    settings, _ = parse_config(Settings, argv)
    out = Path(settings.out)
    rows = read_csv(out) if out.exists() else []
    with tempfile.TemporaryDirectory() as place:
        for side in settings.sides.split(","):
            while (next_run := wanted(settings, side, rows)) is not None:
                rows.append(run(settings, side, *next_run, Path(place)))
                write_csv(out, rows)
                print(
                    f"{side}, rate {next_run[0]:g}, seed {next_run[1]}: {rows[-1]['val_loss']}",
                    flush=True,
                )
    print(summary([row for row in rows if row["dataset"] == settings.dataset]))


if __name__ == "__main__":
    exit_cleanly(main)
