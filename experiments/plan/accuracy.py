"""Predicted against measured memory of training steps -> results/plan_accuracy.csv.

    python -m experiments.plan.accuracy --device=cpu --count=200      about 25 minutes on one core
    python -m experiments.plan.accuracy --device=cuda --count=240     on every GPU there is

Runs are drawn by a seed (draws.py), made as train.py makes them, and stepped three times; the peak
is what train.py itself reports: the third step's on a CPU, the allocator's from the start on CUDA.
On CUDA the allocator has no more than a device for which the plan says that it fits (`limit`): what
runs out of that (`ran_out`) is measured again without a limit. Small runs share a GPU.
Rows of the other device and of other seeds are kept. A row whose run failed says how. Drawn models
only exist here: their data are random tokens in a temporary folder.

It goes on where it was stopped. What was measured stays, with the commit that measured it, and is
predicted anew: after a change of the formulas alone the same command takes seconds.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import train
from configurator import parse_config
from experiments.plan.draws import Settings, draws
from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from leangpt.memory.formulas import PARTS, moments
from leangpt.memory.run import Run
from leangpt.memory.search import CONTEXT, memory_for
from leangpt.system.errors import exit_cleanly, is_out_of_memory
from leangpt.system.runtime import DTYPES, setup_runtime, use_expandable_segments
from leangpt.text.folder import write_dataset
from leangpt.training.planning import run_config
from optimizers import parse_options

CSV = RESULTS / "plan_accuracy.csv"
STEPS = 3
SHARED = 20e9  # predicted bytes, at most, of runs that share a GPU
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
    workers: int = 1  # processes on the CPU, each with a thread; on CUDA those that share a GPU
    again: bool = False  # measure anew what was measured before
    csv: str = str(CSV)  # where rows go
    folder: str = "out-plan-accuracy"  # where they wait until all are there
    first: int = 0  # of a worker: its first run
    every: int = 0  # of a worker: run each so many-th; 0: this is none
    large: bool = False  # of a worker: runs that have a GPU to themselves, not the others


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
    kept = read_csv(path) if path.exists() else []
    mine = (options.device, options.seed)
    kept = [row for row in kept if (row["device"], row["seed"]) != mine]
    write_csv(path, sorted(kept + rows, key=lambda r: (r["device"], r["seed"], r["number"])))
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
    made = {name: row.get(name) for name in ("machine", "torch", "commit")}
    row = {name: value for name, value in row.items() if name not in made}
    row |= {"predicted": predicted, "moment": moment}
    row |= {part: parts.get(part, 0) for part in PARTS}
    row |= {"error": row["measured"] and round(predicted / row["measured"] - 1, 6)}
    tried = {name: row.get(name) for name in ("limit", "ran_out")}
    return row | tried | made


def fan_out(options):
    """Measure in several processes."""
    if options.device == "cpu":
        wait_for([start_worker(options, i, options.workers) for i in range(options.workers)])
        return
    gpus = torch.cuda.device_count()
    for each, large in ((options.workers, False), (1, True)):
        count = gpus * each
        wait_for([start_worker(options, i, count, large, gpu=i % gpus) for i in range(count)])


def start_worker(options, first, every, large=False, gpu=None):
    """A process that measures each `every`-th run, on a GPU of its own or shared."""
    names = ("device", "count", "seed", "csv", "folder", "again")
    command = [sys.executable, "-m", "experiments.plan.accuracy"]
    command += [f"--{name}={getattr(options, name)}" for name in names]
    command += [f"--first={first}", f"--every={every}", f"--large={large}"]
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    threads = max(1, (os.cpu_count() or 1) // every)  # weights are drawn on the CPU
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)} | seen)


def wait_for(processes):
    """Until all have ended."""
    for process in processes:
        process.wait()


def work(options):
    """This process's share: each row is written as soon as it is measured."""
    device = options.device
    known = measured_before(options, from_csv=not options.again)
    part = f"{'large' if options.large else ''}{options.first}"
    path = Path(options.folder) / f"{device}-{options.seed}-{part}.csv"
    path.parent.mkdir(exist_ok=True)
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        use_expandable_segments()  # before the allocator's limit is set, which is too late for it
    drawn = draws(device, options.count, options.seed)
    if device == "cuda":
        drawn = [run for run in drawn if (predicted_bytes(run, device) > SHARED) == options.large]
    rows, began = read_csv(path) if path.exists() else [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for run in drawn[options.first :: options.every]:
            if run["number"] in known:
                continue
            how = partial(apart, measure) if device == "cuda" else measure
            row = how(run, device, folder)
            rows.append(row)
            write_csv(path, rows)
            minutes = (time.perf_counter() - began) / 60
            print(
                f"{row['number']:4d} {row['status']:7} predicted {row['predicted']:>14,} "
                f"measured {row['measured'] or 0:>14,} {row['error'] or 0:+.2%} {row['moment']} "
                f"({minutes:.1f} min)",
                flush=True,
            )


def apart(function, *args):
    """function(*args) in a process of its own: whose allocator has no holes that others left."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(run, device, folder):
    """One run -> its row."""
    threads = torch.get_num_threads()
    _, parts, moment = predict(run, device, device, threads)
    predicted = sum(parts.values())
    row = {"device": device, "number": run["number"], "seed": run["seed"], "family": family(run)}
    row |= {"threads": threads}
    row |= {name: run[name] for name in SHAPES}
    row |= {"status": "ok", "predicted": predicted, "measured": None, "error": None}
    row |= {"moment": moment, **{part: parts.get(part, 0) for part in PARTS}}
    row["limit"] = limit = limit_of(predicted, device)
    for most in dict.fromkeys((limit, None)):
        row["status"], row["measured"] = outcome(run, device, folder, most)
        if row["status"] != "oom":
            break
    row["ran_out"] = limit is not None and most is None
    if row["measured"]:
        row["error"] = round(predicted / row["measured"] - 1, 6)
    return row | provenance(device)


def limit_of(predicted, device):
    """Bytes the allocator has on the smallest GPU that the plan calls large enough, or None: on a
    CPU, and where that is more than this GPU has."""
    if device == "cpu":
        return None
    limit = memory_for(predicted + CONTEXT, device) - CONTEXT
    return limit if limit < torch.cuda.get_device_properties(device).total_memory else None


def outcome(run, device, folder, limit):
    """(status, bytes at the peak or None) of a run that may allocate `limit` bytes."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / total if limit else 1.0)
    try:
        return "ok", peak_of(run, device, folder)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return "oom", None
        return f"{type(error).__name__}: {error}".splitlines()[0][:120], None


def predicted_bytes(run, device):
    """Bytes of a drawn run by formula."""
    return sum(predict(run, device, device, 1)[1].values())


def predict(run, kind, device, threads):
    """(Run, parts, moment) of a drawn run on so many threads."""
    settings = settings_of(run, kind, "")
    trained = run_of(settings, config_of(run), settings_dtype(settings, device), kind)
    trained, here = replace(trained, threads=threads), torch.get_num_threads()
    torch.set_num_threads(threads)  # how many heads a tile takes at once depends on them
    found = moments(trained)
    torch.set_num_threads(here)
    moment = max(found, key=lambda name: sum(found[name].values()))
    return trained, found[moment], moment


def config_of(run):
    """GPTConfig of a drawn run, as train.py has it."""
    names = {field.name for field in fields(train.GPTConfig)}
    given = {name: value for name, value in run.items() if name in names}
    settings = Settings(**{n: v for n, v in given.items() if n != "vocab_size"})
    return run_config(train.GPTConfig, settings, {}, run["vocab_size"])


def settings_dtype(settings, device):
    """autocast's dtype, as train.main chooses it on such a device of today; it need not be here."""
    name = settings.dtype if settings.param_dtype == "float32" else settings.param_dtype
    return DTYPES[{"auto": "bfloat16" if device == "cuda" else "float32"}.get(name, name)]


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
    if device == "cuda":
        torch.compiler.reset()  # or the ninth model of a process is not compiled any more
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = trainer_of(run, device, folder)
    for _ in range(STEPS):
        trainer.losses.add(trainer.iteration, trainer.record.peak.of(trainer.step, trainer.norm))
        trainer.iteration += 1
    return trainer.record.peak.bytes


def trainer_of(run, device, folder):
    """train.py's Trainer of a drawn run, over random tokens under `folder`."""
    random_tokens(folder, run["vocab_size"])
    settings = settings_of(run, device, folder)
    dtype = settings.dtype if settings.param_dtype == "float32" else settings.param_dtype
    pieces = settings.context_parallel
    runtime = setup_runtime(device, dtype, settings.seed, context_parallel=pieces)
    return train.Trainer(settings, {}, runtime)


def random_tokens(folder, vocab_size):
    """A prepared data set of random tokens, named by the number of them that there are."""
    data = Path(folder) / str(vocab_size)
    if not data.exists():
        ids = np.random.default_rng(0).integers(0, vocab_size, 1 << 19).tolist()
        meta = {"tokenizer": "none", "vocab_size": vocab_size, "source": "a generator"}
        write_dataset(data, ids, ids[: 1 << 18], meta | {"sha256": None})


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
