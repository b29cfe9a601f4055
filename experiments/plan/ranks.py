"""Predicted against measured memory of steps on several processes -> results/plan_ranks.csv.

    python -m experiments.plan.ranks --count=60        on a CPU, by gloo: about 15 minutes

Runs are drawn by a seed as accuracy.py's are (draws.py), on 2 or 4 processes of a thread each, that
hold everything (ddp) or shares of it (fsdp), perhaps with sequences in pieces (context_parallel).
They are made as train.py makes them and stepped five times; measured is the peak of the fullest
process in the best of the last three steps. Rows of other seeds are kept; what was measured stays,
and is predicted anew.

The meter does not hear what gloo's threads free. So messages are followed by a pause, in which
those are done, and the one that copies is imitated.
"""

import gc
import os
import random
import socket
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from configurator import parse_config
from experiments.plan import accuracy
from experiments.plan.draws import Space, draw
from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from leangpt.memory.formulas import PARTS, moments
from leangpt.memory.search import shareable
from leangpt.system.errors import exit_cleanly
from leangpt.system.runtime import leave
from leangpt.training.step_peak import step_peak

CSV = RESULTS / "plan_ranks.csv"
SHARED = ("processes", "parallel", "context_parallel")
SHAPES = (*SHARED, *accuracy.SHAPES)
SPACE = Space(
    (64, 96, 128, 192, 256, 384), (16, 32, 64), (1, 6), (64, 4096), 8, (1e5, 2e7), 3e9, 4e8
)  # of each process
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
ALL_TO_ALL = dist.all_to_all_single
PAUSE = 0.002  # seconds, in which gloo's threads are done with a message
WARMUP, MEASURED = 2, 3  # steps
VARIANTS = ("adam", "adamsn8", "adafactor", "muonsn8", "muonsn4")


@dataclass
class Options:
    count: int = 60  # runs
    seed: int = 1  # of the draws
    again: bool = False  # measure anew what was measured before
    csv: str = str(CSV)  # where rows go


def main():
    options, _ = parse_config(Options, config_files=False)
    path = Path(options.csv)
    before = read_csv(path) if path.exists() else []
    kept = [row for row in before if row["seed"] != options.seed]
    known = {row["number"]: row for row in before if row["seed"] == options.seed}
    known = {} if options.again else known
    rows, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for run in draws(options.count, options.seed):
            row = known.get(run["number"]) or measure(run, folder)
            rows.append(predicted(run, row))
            write_csv(path, sorted(kept + rows, key=lambda r: (r["seed"], r["number"])))
            minutes = (time.perf_counter() - began) / 60
            print(
                f"{row['number']:4d} {family(run):28} predicted {rows[-1]['predicted']:>12,} "
                f"measured {row['measured']:>12,} {rows[-1]['error']:+.2%} {rows[-1]['moment']} "
                f"({minutes:.1f} min)",
                flush=True,
            )
    accuracy.report(rows)


# ---------------------------------------------------------------------- what is drawn


def draws(count, seed):
    """`count` runs; the first of a longer list."""
    rng, found = random.Random(f"ranks {seed}"), []
    while len(found) < count:
        if (run := shared_draw(rng)) is not None:
            found.append(run | {"number": len(found), "seed": seed})
    return found


def shared_draw(rng):
    """One run, or None where it contradicts itself. Micro-batches are of all processes, as
    train.py counts them."""
    run = draw(rng, SPACE, "cpu")
    processes, parallel = rng.choice((2, 2, 4)), rng.choice(("ddp", "fsdp", "fsdp", "fsdp"))
    pieces, variant = rng.choice((1, 1, 2)), rng.choice(VARIANTS)
    inside, steps = rng.random() < 0.4, rng.choice((1, 1, 3))
    if run is None or pieces > 1 and run["dropout"]:
        return None
    inside = inside and steps == 1 and parallel == "fsdp" and variant != "adam"
    run |= {"optimizer_variant": variant, "compile": False}
    run["optimizer_options"] = "fused_backward=True" if inside else ""
    if variant == "adam" and run["param_dtype"] == "bfloat16":
        run |= {"param_dtype": "float32", "dtype": "bfloat16"}
    run["gradient_accumulation_steps"] = steps * (processes // pieces)
    run |= dict(processes=processes, parallel=parallel, context_parallel=pieces)
    return run if shareable(run_of(run, "cpu", 1)) else None


def family(run):
    """What a run is mostly about, for the table."""
    name = run["parallel"] + (", pieces" if run["context_parallel"] > 1 else "")
    return name + (", inside backward" if "fused" in run["optimizer_options"] else "")


# ---------------------------------------------------------------------- predicted and measured


def run_of(run, device, threads):
    """A drawn run as the planner's Run, of one process."""
    settings = accuracy.settings_of(run, device, "")
    dtype = accuracy.settings_dtype(settings, device)
    whole = accuracy.run_of(settings, accuracy.config_of(run), dtype, device)
    each = settings.gradient_accumulation_steps // (run["processes"] // run["context_parallel"])
    shared = {name: run[name] for name in SHARED}
    return replace(whole, micro_batches=each, threads=threads, **shared)


def predicted(run, row):
    """The row as today's formulas predict it."""
    torch.set_num_threads(1)
    found = moments(run_of(run, "cpu", 1))
    moment = max(found, key=lambda name: sum(found[name].values()))
    parts, size = found[moment], sum(found[moment].values())
    row = row | {"predicted": size, "error": round(size / row["measured"] - 1, 6)}
    return row | {"moment": moment, **{part: parts.get(part, 0) for part in PARTS}}


def measure(run, folder):
    """One run, by its processes -> its row, of which the prediction is still missing."""
    accuracy.random_tokens(folder, run["vocab_size"])
    with mp.get_context("spawn").Manager() as manager:
        peaks = manager.dict()
        args = (free_port(), run, folder, peaks)
        mp.spawn(work, args=args, nprocs=run["processes"])
        row = {"number": run["number"], "seed": run["seed"], "family": family(run)}
        row |= {name: run[name] for name in SHAPES}
        row |= {"measured": max(peaks.values()), "predicted": None, "error": None, "moment": None}
    return row | dict.fromkeys(PARTS) | provenance("cpu")


def step_of(trainer, measured):
    """One step; bytes at its peak, where it is measured."""
    gc.collect()
    if not measured:
        return trainer.losses.add(trainer.iteration, trainer.step())
    loss, peak = step_peak(trainer.step, trainer.raw_model, trainer.optimizer)
    trainer.losses.add(trainer.iteration, loss)
    return peak


def reduce_aloud(output, input, op=None, group=None, async_op=False):
    """FSDP2's reduce-scatter, of as many bytes as gloo's: of which a thread that no meter hears
    would free the copy."""
    came = torch.empty_like(input)
    dist.all_to_all_single(came, input, group=group)
    time.sleep(PAUSE)
    first, *others = came.view(dist.get_world_size(group), -1)
    output.copy_(first)
    for other in others:
        output += other
    output /= 1 + len(others)


def gather_aloud(output, input, group=None, async_op=False):
    """FSDP2's all-gather, whose numbers gloo's thread has let go of when it is over."""
    ALL_GATHER(output, input, group=group)
    time.sleep(PAUSE)


class Paused:
    """A message that was started, likewise."""

    def __init__(self, work):
        self.work = work

    def wait(self):
        self.work.wait()
        time.sleep(PAUSE)


def exchange_aloud(*args, async_op=False, **kwargs):
    """The optimizers' messages."""
    paused = Paused(ALL_TO_ALL(*args, async_op=True, **kwargs))
    return paused if async_op else paused.wait()


def listen():
    """Have FSDP2 and the optimizers call these."""
    dist.all_to_all_single = exchange_aloud
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):  # new and old names
        setattr(dist, name, reduce_aloud)
    for name in ("all_gather_single", "all_gather_into_tensor"):
        setattr(dist, name, gather_aloud)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def work(rank, port, run, folder, peaks):
    """One process of a run."""
    torch.set_num_threads(1)
    launch = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=run["processes"], MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in launch.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    listen()
    peaks[rank] = peak_of(run, folder)
    leave()  # what is left of gloo's threads may abort an interpreter that is taken down


def peak_of(run, folder):
    """Bytes at the peak of this process's steps, the least of those measured."""
    trainer, peaks = accuracy.trainer_of(run, "cpu", folder), []
    for step in range(WARMUP + MEASURED):
        peaks.append(step_of(trainer, step >= WARMUP))
        trainer.iteration += 1
    dist.barrier()
    dist.destroy_process_group()
    return min(peaks[WARMUP:])


if __name__ == "__main__":
    exit_cleanly(main)
