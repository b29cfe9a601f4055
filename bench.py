"""Time and memory of one transformer block under every attention policy, as a table or CSV.

  python bench.py                                     the default grid, a table on the screen
  python bench.py --seq=1024,8192 --policy=cache,recompute --q-chunk=1024 --csv=bench.csv
  python bench.py --device=cuda --dtype=bfloat16 --d-model=768 --heads=12 --print

Each cell runs in a process of its own, so that no cell inherits another's memory and one that
runs out of it, or out of time, becomes a row instead of the end of the sweep. Time is the median
over runs after a warm-up. The peak is the allocator's own, exact on the CPU too
(leangpt/memory/meter.py), beyond the weights and the input; beside it what the formula of
leangpt/memory/tiles.py says (none for int4, whose weights are unpacked for a while). MB are 2**20
bytes. The error is against a plain softmax attention in float64, largest difference over largest
value; int4's is against the block before packing, so it is what the 4 bits cost, for which
weights_MB is what they save.
"""

import copy
import csv
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

try:
    import resource
except ImportError:  # Windows: there the whole machine runs out of memory
    resource = None

import psutil
import torch
from tqdm import tqdm

from configurator import parse_config
from leangpt.attention.tile_sizes import tile_sizes
from leangpt.int4.quantize import quantize_
from leangpt.memory.block_cell import (
    block_arguments,
    block_peak,
    build_block,
    forward,
    forward_error,
    random_input,
)
from leangpt.memory.meter import tensor_bytes
from leangpt.memory.tiles import predict_block_peak
from leangpt.system.errors import (
    RunError,
    UserError,
    exit_cleanly,
    is_out_of_memory,
    named_as_typed,
    refused,
)
from leangpt.system.runtime import DTYPES, setup_runtime
from leangpt.system.timing import MIB, commit_id, describe_machine, quartiles, synchronize, timed
from leangpt.system.whole_files import writing
from model import Block, GPTConfig

COLUMNS = (
    "seq",
    "policy",
    "k_chunk",
    "q_chunk",
    "kv_heads",
    "time_s",
    "peak_cuda_MB",
    "delta_rss_MB",
    "out_shape",
    "peak_MB",
    "predicted_MB",
    "weights_MB",
    "iqr_s",
    "status",
    "max_rel_err",
    "device",
    "dtype",
    "batch",
    "d_model",
    "heads",
    "runs",
    "machine",
    "torch",
    "commit",
    "message",
)
SHOWN = (
    "seq",
    "policy",
    "q_chunk",
    "k_chunk",
    "kv_heads",
    "time_s",
    "iqr_s",
    "peak_MB",
    "predicted_MB",
    "weights_MB",
    "max_rel_err",
    "status",
    "message",
)  # on the screen
LONGEST = 2_000_000  # seconds that waiting for a process can take
INT4_GROUP = 32  # weights of a row that int4 packs together
WIDTHS = (8, 10, 8, 8, 9, 10, 10, 10, 13, 11, 12, 8, 0)


def named(alias, default, help):
    """A setting that may also be called as train.py calls it."""
    return field(default=default, metadata={"alias": alias, "help": help})


def fixed(reason):
    """A setting of other programs', of which only False is what happens here."""
    return field(default=False, metadata={"fixed": reason})


@dataclass
class Settings:
    """What to measure: lists are grids, each combination of theirs a cell."""

    seq: tuple[int, ...] = named("block_size", (1024, 4096, 16384), "sequence lengths T")
    policy: tuple[str, ...] = named(
        "attention_policy", ("cache", "grouped", "recompute", "int4"), "or plain: no tiles"
    )
    runs: int = 5  # timed runs a cell, after one warm-up
    batch: int = named("batch_size", 1, "sequences at once")
    d_model: int = named("n_embd", 256, "width of the residual stream")
    heads: int = named("n_head", 8, "attention heads")
    kv_heads: int | None = named(
        "n_kv_head", None, "key/value heads; None: 2 for grouped, all heads for the others"
    )
    q_chunk: tuple[int, ...] = ()  # rows per tile; none given: recompute chooses, others take none
    k_chunk: tuple[int, ...] = ()  # key/value rows per tile; none given: chosen
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "float32"  # float32 | bfloat16 | float16
    seed: int = 1337  # of weights and input
    timeout: float = 600.0  # seconds a cell may take, in all
    print: bool = False  # CSV on stdout instead of the table
    csv: str | None = None  # also write the CSV to this file
    # of nanoGPT's bench.py, which times training steps of a whole model (ours: train.py's log)
    bias: bool = fixed("the block has no biases")
    real_data: bool = fixed("the block's input is random numbers")
    compile: bool = fixed("the block is timed as it is; train.py --compile=True times itself")
    profile: bool = fixed("no profiler is built in; torch.profiler takes train.main()")


def main():
    """Every cell in a process of its own, printed as soon as it is measured."""
    if sys.argv[1:2] == ["--worker"]:  # hidden: this file calling itself, one cell
        json.dump(run_cell(json.loads(sys.argv[2])), sys.stdout)
        return
    settings, given = parse_config(Settings)
    with named_as_typed(given.typed):
        cells = grid(settings)
    writers = []
    if settings.csv:
        try:
            writers.append(csv_writer(open(settings.csv, "w", newline=""), settings.csv))
        except OSError as error:
            raise refused(f"--csv={settings.csv}", error) from None
    if settings.print:
        writers.append(csv_writer(sys.stdout, "standard output"))
    else:
        print_line(SHOWN)
        writers.append(print_row)
    failed = 0
    with tqdm(cells, desc="bench", unit="cell", disable=None) as bar:  # None: only on a terminal
        for cell in bar:
            bar.set_postfix_str(f"{cell['policy']} T={cell['seq']}")
            row = run_in_process(cell, settings.timeout)
            failed += row["status"] == "error"
            with tqdm.external_write_mode():
                for write in writers:
                    write(row)
    if failed:
        raise RunError(f"{failed} of {len(cells)} cells failed: see their messages")


def grid(settings):
    """The cells to run, as dicts, lengths outermost. Raises UserError for what cannot be run."""
    for name in ("runs", "batch", "timeout"):
        if getattr(settings, name) <= 0:
            raise UserError(f"--{name} must be positive, not {getattr(settings, name)}")
    if settings.timeout > LONGEST:
        raise UserError(f"--timeout must be at most {LONGEST:,} seconds, not {settings.timeout:g}")
    for name in ("seq", "policy"):
        if not getattr(settings, name):
            raise UserError(f"--{name} is empty: give at least one, as in --seq=1024,4096")
    for name in ("seq", "q_chunk", "k_chunk"):
        if (least := min(getattr(settings, name), default=1)) <= 0:
            raise UserError(f"--{name} must be positive, not {least}")
    if settings.kv_heads is not None and settings.kv_heads <= 0:
        raise UserError(f"--kv_heads must be positive, not {settings.kv_heads}")
    if settings.dtype not in DTYPES:
        raise UserError(f"unknown dtype {settings.dtype!r}; choose from: {', '.join(DTYPES)}")
    device = str(setup_runtime(settings.device, settings.dtype, settings.seed).device)
    shared = {
        name: getattr(settings, name)
        for name in ("runs", "batch", "d_model", "heads", "kv_heads", "dtype", "seed")
    }
    cells = {}
    axes = (settings.seq, settings.policy, settings.q_chunk or (None,), settings.k_chunk or (None,))
    for seq, policy, q_chunk, k_chunk in itertools.product(*axes):
        cell = dict(shared, seq=seq, policy=policy, q_chunk=q_chunk, k_chunk=k_chunk, device=device)
        # A wrong shape is told before anything runs; what ignores its chunks is run once.
        cells.setdefault((policy, repr(cell_config(cell))), cell)
    return list(cells.values())


def cell_config(cell):
    """A cell (dict of its settings) -> the GPTConfig of its block."""
    shape = (cell[name] for name in ("d_model", "heads", "kv_heads", "q_chunk", "k_chunk"))
    try:
        config = GPTConfig(**block_arguments(cell["policy"], cell["seq"], *shape))
    except UserError as error:  # in the names of this page's settings
        names = {"n_kv_head": "kv_heads", "n_head": "heads", "n_embd": "d_model"}
        raise UserError(re.sub("|".join(names), lambda m: names[m[0]], str(error))) from None
    if cell["policy"] == "int4" and cell["d_model"] % INT4_GROUP:
        raise UserError(
            f"int4 packs {INT4_GROUP} weights at a time, which does not divide "
            f"d_model={cell['d_model']}: give --policy without int4"
        )
    return config


def run_in_process(cell, timeout):
    """One row of the table, whatever becomes of the cell."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(cell)]
    # Freeing a tensor from before a measurement would be reported on stderr each time
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return row_of(cell, "timeout", f"not finished after {timeout:g} s")
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode == -9:  # SIGKILL, which is how Linux takes memory back
        return row_of(cell, "oom", "killed by the operating system")
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return row_of(cell, "error", lines[-1].removeprefix("error: "))


def row_of(cell, status, message):
    """A row that says what was to be measured, with what, and what came of it; no measurements."""
    row = dict.fromkeys(COLUMNS, "")
    row.update({name: cell[name] for name in COLUMNS if cell.get(name) is not None})
    return row | {
        "kv_heads": cell_config(cell).kv_heads,
        "status": status,
        "message": message,
        "machine": describe_machine(cell["device"]),
        "torch": torch.__version__,
        "commit": commit_id(),
    }


def run_cell(cell):
    """Measure one cell in this process -> its row."""
    device, dtype = cell["device"], DTYPES[cell["dtype"]]
    if device == "cpu":
        limit_memory()
    try:
        return measure_cell(cell, device, dtype)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return row_of(cell, "oom", str(error).split("DefaultCPUAllocator: ")[-1][:200])


def limit_memory():
    """Make running out of memory an error of this process, not a matter for the whole machine."""
    if resource is None:
        return
    memory, (_, most) = psutil.Process().memory_info(), resource.getrlimit(resource.RLIMIT_AS)
    limit = memory.vms + psutil.virtual_memory().available
    if most == resource.RLIM_INFINITY or limit < most:  # else the user's own limit is tighter
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def measure_cell(cell, device, dtype):
    """Time, exact peak and error of one block -> dict of the row's measured columns."""
    config = cell_config(cell)
    B, T, seed = cell["batch"], cell["seq"], cell["seed"]
    block = exact = build_block(Block, config, device, dtype, seed)
    if cell["policy"] == "int4":
        block = quantize_(copy.deepcopy(exact), INT4_GROUP)
    x = random_input(config, B, T, device, dtype, seed)
    process = psutil.Process()
    rss = process.memory_info().rss

    def run():
        nonlocal out_shape
        out_shape = tuple(forward(block, x).shape)

    out_shape = None
    run()  # warm-up; the resident set has grown to what it will be
    synchronize(device)
    delta_rss = process.memory_info().rss - rss
    seconds = []
    for _ in range(cell["runs"]):
        x.copy_(random_input(config, B, T, device, dtype, seed))  # a run may have written over it
        seconds.append(timed(run, device))
    peak = block_peak(run, block, x, device)
    error = forward_error(block, exact, random_input(config, B, T, device, dtype, seed))
    median, iqr = quartiles(seconds)
    with torch.inference_mode():
        q_chunk, k_chunk = tile_sizes(config, x.size(1), x.device.type) or ("", "")
    predicted = (
        ""
        if cell["policy"] == "int4"
        else round(
            predict_block_peak(config, B, T, dtype.itemsize, torch.device(device).type) / MIB, 3
        )
    )
    row = row_of(cell, "ok", "")
    row.update(
        k_chunk=k_chunk,
        q_chunk=q_chunk,
        time_s=round(median, 6),
        iqr_s=round(iqr, 6),
        peak_cuda_MB=round(peak / MIB, 3) if device != "cpu" else "",
        delta_rss_MB=round(delta_rss / MIB, 3),
        peak_MB=round(peak / MIB, 3),
        predicted_MB=predicted,
        weights_MB=round(tensor_bytes(block) / MIB, 3),
        out_shape=str(out_shape),
        max_rel_err="" if error is None else float(f"{error:.3g}"),
    )
    return row


def csv_writer(file, name):
    """A function that writes a row as CSV at once, so that a sweep cut short keeps its rows.

    Its heading is written here: what refuses that is known before anything is measured.
    """
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")

    def write(row):
        with writing(name):
            writer.writerow(row)
            file.flush()

    write(dict(zip(COLUMNS, COLUMNS)))
    return write


def print_row(row):
    """One line of the table on the terminal."""
    print_line([row[name] for name in SHOWN])


def print_line(values):
    """Values in the columns of the table."""
    print(
        " ".join(f"{value!s:<{width}}" for value, width in zip(values, WIDTHS)).rstrip(), flush=True
    )


if __name__ == "__main__":
    exit_cleanly(main)
