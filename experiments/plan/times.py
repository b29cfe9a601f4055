"""Predicted against measured times of plans -> results/plan_times.csv; on a quiet machine.

    python -m experiments.plan.times --device=cpu      about ten minutes on one core
    python -m experiments.plan.times --device=cuda

Models are drawn as accuracy.py draws them. Of each some of the ways that plan.py would try (blocks,
optimizers, micro-batches; drawn too) are made as train.py makes them, and stepped: on a CPU in
turns, so that what slows the machine for a while slows all of them; on a GPU one after the other,
since they do not stand there together. Predictions are from this machine's rates, measured first
(calibrate.py). What matters is whether plans of one model come in the same
order: `correlation` in the CSV is Spearman's over a model's plans.
"""

import gc
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import torch

from configurator import parse_config
from experiments.plan.accuracy import config_of, run_of, settings_dtype, settings_of, trainer_of
from experiments.plan.draws import draws
from experiments.shared.common import RESULTS, interleaved, provenance, read_csv, write_csv
from leangpt.memory.search import Wish, peak_of, ways
from leangpt.memory.speed import calibrate, seconds
from leangpt.system.errors import exit_cleanly
from leangpt.system.timing import timed

CSV = RESULTS / "plan_times.csv"
SEQUENCES = 4  # an iteration
MOST = {"cpu": 12e9, "cuda": 60e9}  # bytes that a plan may take


@dataclass
class Options:
    device: str = "cpu"  # cpu | cuda
    models: int = 10  # drawn
    plans: int = 10  # of each
    rounds: int = 3  # of steps; the median counts
    compile: bool = False  # as train.py compiles on a GPU
    seed: int = 1  # of the draws
    csv: str = str(CSV)  # where rows go


def main():
    options, _ = parse_config(Options, config_files=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for drawn in draws(options.device, options.models, options.seed):
            rows += times_of(drawn, options, folder)
            print(f"model {drawn['number']}: {rows[-1]['correlation']:+.3f}", flush=True)
    path = Path(options.csv)
    others = [r for r in read_csv(path) if r["device"] != options.device] if path.exists() else []
    write_csv(path, others + rows)
    found = {row["model"]: row["correlation"] for row in rows}.values()
    off = [abs(row["predicted_s"] / row["measured_s"] - 1) for row in rows]
    print(f"correlation: mean {mean(found):.3f}, least {min(found):.3f}; off {median(off):.0%}")


def times_of(drawn, options, folder):
    """Rows of one model's plans."""
    # without dropout, which tiles of attention cannot replay; each plan has these sequences
    drawn = drawn | {"batch_size": SEQUENCES, "gradient_accumulation_steps": 1, "dropout": 0.0}
    drawn |= {"attention_dropout": None, "optimizer_options": "", "compile": options.compile}
    settings = settings_of(drawn, options.device, folder)
    dtype = settings_dtype(settings, options.device)
    asked = run_of(settings, config_of(drawn), dtype, options.device)
    rates = calibrate(torch.device(options.device), dtype)
    runs = plans_of(asked, options.plans, random.Random(f"{options.seed} {drawn['number']}"))
    measure = one_by_one if options.device == "cuda" else in_turns
    measured = measure([as_drawn(drawn, run) for run in runs], options, folder)
    predicted = [seconds(run, rates) for run in runs]
    agree = round(spearman(predicted, measured), 4)
    return [
        {"device": options.device, "model": drawn["number"], "seed": options.seed}
        | {"plan": flags(run), "predicted_s": round(p, 6), "measured_s": round(m, 6)}
        | {"correlation": agree, **provenance(options.device)}
        for run, p, m in zip(runs, predicted, measured)
    ]


def in_turns(runs, options, folder):
    """Median seconds of a step of each run."""
    trainers = [trainer_of(run, options.device, folder) for run in runs]
    steps = [lambda t=t: timed(t.step, t.runtime.device) for t in trainers]
    interleaved(steps, 1)  # what a first step alone does
    return [median(found) for found in interleaved(steps, options.rounds)]


def one_by_one(runs, options, folder):
    """The same where each run has the GPU to itself."""
    found = []
    for run in runs:
        torch.compiler.reset()
        with torch.device(options.device):  # any weights will do
            trainer = trainer_of(run, options.device, folder)
        times = [timed(trainer.step, trainer.runtime.device) for _ in range(2 + options.rounds)]
        found.append(median(times[2:]))
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
    return found


def plans_of(asked, count, rng):
    """Ways of a Run, some of them in micro-batches."""
    found = [run for run in ways(Wish(asked)) if peak_of(run) < MOST[run.device_type]]
    found = rng.sample(found, min(count, len(found)))
    return [run if run.fused else in_pieces(run, rng.choice((1, 1, 2, 4))) for run in found]


def in_pieces(run, pieces):
    """The same sequences in so many micro-batches."""
    return replace(run, batch_size=SEQUENCES // pieces, micro_batches=pieces)


def as_drawn(drawn, run):
    """A plan as draws.py writes runs down."""
    blocks = ("attention_policy", "q_chunk", "k_chunk", "checkpoint_layers", "offload")
    narrow = run.param_bytes == 2
    return (
        drawn
        | {name: getattr(run.config, name) for name in blocks}
        | {
            "optimizer_variant": run.variant,
            "optimizer_options": ",".join(f"{k}={v}" for k, v in run.options.items()),
            "param_dtype": "bfloat16" if narrow else "float32",
            "dtype": "auto" if narrow else drawn["dtype"],
            "batch_size": run.batch_size,
            "gradient_accumulation_steps": run.micro_batches,
        }
    )


def flags(run):
    """A plan in few words."""
    c = run.config
    words = [run.variant, *(f"{name}={value}" for name, value in run.options.items())]
    words += ["bfloat16"] * (run.param_bytes == 2)
    words += [c.attention_policy] + [f"q_chunk={c.q_chunk}"] * bool(c.q_chunk)
    words += ["checkpoint_layers"] * c.checkpoint_layers + ["offload"] * c.offload
    return " ".join([*words, f"{run.micro_batches} x {run.batch_size}"])


def spearman(a, b):
    """Rank correlation of two lists, ties at their mean rank: Pearson's of the ranks."""

    def ranks(values):
        return [sum(w < v for w in values) + sum(w == v for w in values) / 2 for v in values]

    x, y = ranks(a), ranks(b)
    x, y = ([v - mean(r) for v in r] for r in (x, y))
    scale = (sum(v * v for v in x) * sum(v * v for v in y)) ** 0.5
    return sum(v * w for v, w in zip(x, y)) / scale if scale else 1.0


if __name__ == "__main__":
    exit_cleanly(main)
