"""Predicted against measured memory of training steps -> results/plan_accuracy.csv.

    python -m experiments.plan.accuracy --device=cpu --count=200      about 25 minutes on one core
    python -m experiments.plan.accuracy --device=cuda --count=240     on every GPU there is

Runs are drawn by a seed (draws.py), made as train.py makes them, and stepped three times; the peak
is what train.py itself reports: the third step's on a CPU, the allocator's from the start on CUDA.
Rows of the other device are kept. A row whose run failed says how. Drawn models only exist here:
their data are random tokens in a temporary folder.

It goes on where it was stopped. What was measured stays, with the commit that measured it, and is
predicted anew: after a change of the formulas alone the same command takes seconds.
"""

import gc
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

import train
from configurator import parse_config
from experiments.plan.draws import Settings, draws
from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from leangpt.memory.formulas import PARTS, moments
from leangpt.memory.run import Run
from leangpt.system.errors import exit_cleanly, is_out_of_memory
from leangpt.system.runtime import setup_runtime
from leangpt.text.folder import write_dataset
from optimizers import parse_options

CSV = RESULTS / "plan_accuracy.csv"
STEPS = 3
SHAPES = (
    "n_layer n_head n_kv_head n_embd n_inner vocab_size block_size batch_size "
    "gradient_accumulation_steps position mlp norm bias tie_embeddings dropout attention_dropout "
    "attention_policy q_chunk k_chunk checkpoint_layers offload optimizer_variant "
    "optimizer_options param_dtype dtype compile"
).split()


@dataclass
class Options:
    device: str = "cpu"  # cpu | cuda
    count: int = 200  # runs
    seed: int = 1  # of the draws
    workers: int = 1  # processes on the CPU, each with a thread; on CUDA one for each GPU
    again: bool = False  # measure anew what was measured before
    csv: str = str(CSV)  # where rows go
    folder: str = "out-plan-accuracy"  # where they wait until all are there
    first: int = 0  # of a worker: its first run
    every: int = 0  # of a worker: run each so many-th; 0: this is none


def main():
    options, _ = parse_config(Options, config_files=False)
    if options.every:
        work(options)
        return
    drawn = draws(options.device, options.count, options.seed)
    if options.again:
        for file in waiting(options):
            file.unlink()
    known = {} if options.again else measured_before(options)
    if any(run["number"] not in known for run in drawn):
        fan_out(options)
    known |= measured_before(options, from_csv=not options.again)
    rows = [again(run, known[run["number"]]) for run in drawn if run["number"] in known]
    path = Path(options.csv)
    others = [r for r in read_csv(path) if r["device"] != options.device] if path.exists() else []
    write_csv(path, others + rows)
    report(rows)


def waiting(options):
    """Files of rows that were measured and are not in the CSV yet."""
    return sorted(Path(options.folder).glob(f"{options.device}-{options.seed}-*.csv"))


def measured_before(options, from_csv=True):
    """number -> row, of those that these draws have already."""
    files = [Path(options.csv)] * from_csv + waiting(options)
    rows = [row for file in files if file.exists() for row in read_csv(file)]
    mine = (options.device, options.seed)
    return {row["number"]: row for row in rows if (row["device"], row["seed"]) == mine}


def again(run, row):
    """The row as today's formulas predict it: only what was measured stays."""
    _, parts, moment = predict(run, row["device"], row["device"], row["threads"])
    predicted = sum(parts.values())
    row |= {"predicted": predicted, "moment": moment}
    row |= {part: parts.get(part, 0) for part in PARTS}
    return row | {"error": row["measured"] and round(predicted / row["measured"] - 1, 6)}


def fan_out(options):
    """Measure in several processes."""
    count = torch.cuda.device_count() if options.device == "cuda" else options.workers
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.plan.accuracy", f"--first={i}", f"--every={count}"]
            + [f"--{name}={getattr(options, name)}" for name in ("count", "seed", "csv", "folder")]
            + [f"--again={options.again}"]
            + [f"--device={options.device}" + (f":{i}" if options.device == "cuda" else "")]
        )
        for i in range(count)
    ]
    for worker in workers:
        worker.wait()


def work(options):
    """This process's share: each row is written as soon as it is measured."""
    device, kind = options.device, options.device.partition(":")[0]
    options = replace(options, device=kind)
    known = measured_before(options, from_csv=not options.again)
    path = Path(options.folder) / f"{kind}-{options.seed}-{options.first}.csv"
    path.parent.mkdir(exist_ok=True)
    if kind == "cpu":
        torch.set_num_threads(1)
    drawn = draws(kind, options.count, options.seed)[options.first :: options.every]
    rows, began = read_csv(path) if path.exists() else [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for run in drawn:
            if run["number"] in known:
                continue
            row = measure(run, device, folder)
            rows.append(row)
            write_csv(path, rows)
            minutes = (time.perf_counter() - began) / 60
            print(
                f"{row['number']:4d} {row['status']:7} predicted {row['predicted']:>14,} "
                f"measured {row['measured'] or 0:>14,} {row['error'] or 0:+.2%} {row['moment']} "
                f"({minutes:.1f} min)",
                flush=True,
            )


def measure(run, device, folder):
    """One run -> its row."""
    kind = device.partition(":")[0]
    threads = torch.get_num_threads()
    _, parts, moment = predict(run, kind, device, threads)
    predicted = sum(parts.values())
    row = {"device": kind, "number": run["number"], "seed": run["seed"], "family": family(run)}
    row |= {"threads": threads}
    row |= {name: run[name] for name in SHAPES}
    row |= {"status": "ok", "predicted": predicted, "measured": None, "error": None}
    row |= {"moment": moment, **{part: parts.get(part, 0) for part in PARTS}}
    try:
        row["measured"] = peak_of(run, device, folder)
        row["error"] = round(predicted / row["measured"] - 1, 6)
    except (RuntimeError, MemoryError) as error:
        row["status"] = "oom" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        row["status"] = row["status"].splitlines()[0][:120]
    return row | provenance(device)


def predict(run, kind, device, threads):
    """(Run, parts, moment) of a drawn run on so many threads."""
    settings = settings_of(run, kind, "")
    trained = run_of(settings, config_of(run), settings_dtype(settings, device), kind)
    trained = replace(trained, threads=threads)
    found = moments(trained)
    moment = max(found, key=lambda name: sum(found[name].values()))
    return trained, found[moment], moment


def config_of(run):
    """GPTConfig of a drawn run."""
    names = {field.name for field in fields(train.GPTConfig)}
    return train.GPTConfig(**{name: value for name, value in run.items() if name in names})


def settings_dtype(settings, device):
    """autocast's dtype, as train.main chooses it."""
    name = settings.dtype if settings.param_dtype == "float32" else settings.param_dtype
    return setup_runtime(device, name, settings.seed).dtype


def run_of(settings, config, dtype, kind):
    """Settings as the planner's Run."""
    return Run(
        config,
        settings.batch_size,
        settings.block_size,
        settings.gradient_accumulation_steps,
        settings.optimizer_variant,
        parse_options(settings.optimizer_options),
        4 if settings.param_dtype == "float32" else 2,
        dtype.itemsize,
        kind,
        compiled=bool(settings.compile),
    )


def settings_of(run, device, data_dir):
    """train.py's settings of a drawn run."""
    names = {field.name for field in fields(Settings)}
    given = {name: value for name, value in run.items() if name in names and name != "seed"}
    given |= dict(device=device, data_dir=str(data_dir), dataset=str(run["vocab_size"]))
    return Settings(**given, max_iters=10, warmup_iters=1, out_dir=str(data_dir))


def peak_of(run, device, folder):
    """Bytes at the peak of three steps."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = trainer_of(run, device, folder)
    for _ in range(STEPS):
        trainer.losses.add(trainer.iteration, trainer.record.peak.of(trainer.step, trainer.norm))
        trainer.iteration += 1
    return trainer.record.peak.bytes


def trainer_of(run, device, folder):
    """train.py's Trainer of a drawn run, over random tokens under `folder`."""
    data = Path(folder) / str(run["vocab_size"])
    if not data.exists():
        ids = np.random.default_rng(0).integers(0, run["vocab_size"], 1 << 19).tolist()
        meta = {"tokenizer": "none", "vocab_size": run["vocab_size"], "source": "a generator"}
        write_dataset(data, ids, ids[: 1 << 18], meta | {"sha256": None})
    settings = settings_of(run, device, folder)
    dtype = settings.dtype if settings.param_dtype == "float32" else settings.param_dtype
    return train.Trainer(settings, {}, setup_runtime(device, dtype, settings.seed))


def family(run):
    """What a run is mostly about, for the table: how its blocks run, and when weights move."""
    if run["offload"]:
        name = "offload"
    elif run["checkpoint_layers"]:
        name = "checkpoint_layers"
    elif run["q_chunk"]:
        name = "tiles"
    else:
        name = "plain"
    return name + (", inside backward" if "fused" in run["optimizer_options"] else "")


def report(rows):
    """Errors in words."""
    errors = sorted(abs(row["error"]) for row in rows if row["error"] is not None)
    if errors:
        print(
            f"{len(errors)} of {len(rows)} measured: median {errors[len(errors) // 2]:.2%}, "
            f"90% within {errors[len(errors) * 9 // 10]:.2%}, worst {errors[-1]:.2%}"
        )


if __name__ == "__main__":
    exit_cleanly(main)
