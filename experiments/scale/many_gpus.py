"""Time, peak and efficiency of one training step on 1, 2, 4 or 8 GPUs -> results/many_gpus.csv

    python -m experiments.scale.many_gpus --gpus=4
    python -m experiments.scale.many_gpus --gpus=8 --stages=long,70b
    python -m experiments.scale.many_gpus --gpus=2 --size=tiny --device=cpu --out=/tmp/many.csv

The stages differ between numbers of GPUs in that number only:

    124m     GPT-2 124M, T=1,024, 32 sequences a card, ddp and fsdp, adam and muonsn8
    8b       Llama-3-8B's shape, T=8,192, 8 sequences in all, fsdp, updates inside backward
    long     the same by sequences in pieces on all cards: --lengths
    70b      Llama-3-70B's shape, 3 bytes per parameter over the cards: T=4,096, and --lengths
    step     8B: the optimizer's step alone, ours beside torch.optim.Muon under FSDP2
    context  a block of 8B's shape alone: ours beside torch's context_parallel

Weights of the large shapes are random numbers on the card. One process a card, started from here.
Model FLOPs counted: 6 N T + 6 T^2 C L a sequence, against 989 TFLOP/s a card. A step that does not
fit is a row without a time. Rows of other numbers of GPUs in the table stay.
"""

import os
import socket
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from configurator import parse_config
from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from leangpt.memory import formulas
from leangpt.memory.meter import PeakMeter
from leangpt.memory.run import Run
from leangpt.optim import build_optimizer, state_bytes
from leangpt.parallel.engine import Parallel, clip_gradients
from leangpt.parallel.pieces import cut_sequences
from leangpt.system.errors import UserError, exit_cleanly, is_out_of_memory
from leangpt.system.runtime import setup_runtime
from leangpt.system.timing import synchronize
from model import GPT, GPTConfig

STAGES = ("124m", "8b", "long", "70b", "step", "context")
CHIP = 989e12  # FLOP/s of an H100 in bfloat16
LLAMA = dict(
    norm="rmsnorm", mlp="swiglu", position="rope", n_kv_head=8, tie_embeddings=False
) | dict(vocab_size=128256, checkpoint_layers=True)
SHAPES = {
    "full": {
        "124m": dict(block_size=1024),
        "8b": dict(n_layer=32, n_head=32, n_embd=4096, n_inner=14336, **LLAMA),
        "70b": dict(n_layer=80, n_head=64, n_embd=8192, n_inner=28672, **LLAMA),
    },
    "tiny": {
        "124m": dict(block_size=32, vocab_size=64, n_layer=2, n_head=4, n_embd=64),
        "8b": dict(n_layer=2, n_head=8, n_embd=64, n_inner=96, **LLAMA | dict(vocab_size=64)),
        "70b": dict(n_layer=3, n_head=8, n_embd=64, n_inner=96, **LLAMA | dict(vocab_size=64)),
    },
}


@dataclass
class Settings:
    gpus: int = 1  # processes, one a card
    size: str = "full"  # full | tiny: shapes that a CPU takes
    device: str = "cuda"  # cuda | cpu
    stages: str = ",".join(STAGES)  # which, in that order
    lengths: tuple[int, ...] = (524288, 1048576)  # tokens a sequence, of long and 70b
    steps: int = 8  # that are timed
    large_steps: int = 3  # the same of 8b, long and 70b
    warmup: int = 2  # steps before those
    layers: int = 0  # of long and 70b: so many, where a whole step would take too long; 0: all
    bucket_mb: int = 0  # of gradients that travel together under ddp; 0: as torch has it
    checkpoint_first: int = 0  # of 8b: so many layers are checkpointed; 0: all
    out: str = str(RESULTS / "many_gpus.csv")


@dataclass
class Case:
    """One row: what is measured."""

    stage: str
    model: str  # a key of SHAPES
    mode: str  # none | ddp | fsdp
    variant: str
    T: int
    sequences: int  # in all; where they are in pieces, shared by every card
    pieces: int = 1  # processes that share a sequence
    inside: bool = False  # updates inside backward, bfloat16 weights
    offload: bool = False
    layers: int = 0  # of the model, if not all
    checkpoint_first: int = 0  # layers that are checkpointed, if not all


def cases(settings):
    """The Cases of every training stage."""
    N, tiny = settings.gpus, settings.size == "tiny"
    sharded = "fsdp" if N > 1 else "none"
    lengths = (60,) if tiny else settings.lengths
    on_card = settings.device == "cuda"
    for mode in ("ddp", "fsdp") if N > 1 else ("none",):
        for variant in ("adam", "muonsn8"):
            T, each = (32, 2) if tiny else (1024, 32)
            yield Case("124m", "124m", mode, variant, T, each * N)
    for variant in ("adamsn8", "muonsn8"):
        T, sequences = (32, N) if tiny else (8192, max(8, N))
        first = settings.checkpoint_first
        yield Case("8b", "8b", sharded, variant, T, sequences, 1, True, checkpoint_first=first)
    for stage, model, tokens in (("long", "8b", lengths), ("70b", "70b", (4096, *lengths))):
        for T in tokens[-1:] if tiny else tokens:
            fewer = settings.layers * (stage in ("long", "70b"))
            yield Case(stage, model, sharded, "adamsn8", T, 1, N, True, on_card, fewer)


# ---------------------------------------------------------------------- one process


def work(rank, settings, port):
    """What each process does: every stage; the first one writes the rows."""
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=settings.gpus, MASTER_PORT=port)
    os.environ.update({k: str(v) for k, v in environment.items()}, MASTER_ADDR="127.0.0.1")
    if settings.device == "cpu":
        torch.set_num_threads(1)
    runtime = setup_runtime(settings.device, "bfloat16" if settings.device == "cuda" else "auto")
    wanted = settings.stages.split(",")
    rows = [case_row(case, settings, runtime) for case in cases(settings) if case.stage in wanted]
    if "step" in wanted:
        rows += optimizer_rows(settings, runtime)
    if "context" in wanted and settings.gpus > 1 and settings.device == "cuda":
        rows += context_rows(settings, runtime)
    if rank == 0:
        names = dict.fromkeys(name for row in rows for name in row)
        ours = {(row["gpus"], row["stage"]) for row in rows}
        before = read_csv(settings.out) if Path(settings.out).exists() else []
        kept = [row for row in before if (row["gpus"], row["stage"]) not in ours]
        names |= dict.fromkeys(name for row in kept for name in row)
        write_csv(settings.out, [{n: row.get(n) for n in names} for row in kept + rows])
    runtime.close()


def build(case, settings, runtime):
    """(model, what to call for a loss, Parallel, optimizer) of a case, on this process's device."""
    shape = SHAPES[settings.size][case.model]
    shape = shape | dict(block_size=case.T, offload=case.offload)
    shape |= {"n_layer": case.layers} if case.layers else {}
    shape |= {"checkpoint_first": case.checkpoint_first or None}
    runtime.context_parallel = case.pieces
    device, large = runtime.device, case.model != "124m"
    parallel = Parallel(case.mode, runtime)
    torch.manual_seed(0)
    with torch.device("meta" if large else "cpu"):
        model = GPT(GPTConfig(**shape))
    if case.inside and device.type == "cuda":
        model.bfloat16()
    if not large:
        model.to(device)
    if case.pieces > 1:
        cut_sequences(model, model.transformer.h, case.pieces)
    parallel.shard(model, model.transformer.h)
    if large:  # numbers of the right size, on the card and nowhere else
        model.to_empty(device=device)
        for p in model.parameters():
            local = p.to_local() if hasattr(p, "to_local") else p
            torch.nn.init.normal_(local.data, std=0.02) if p.ndim > 1 else local.data.fill_(1.0)
    options = dict(fused_backward=True, grad_clip=1.0) if case.inside else {}
    optimizer = build_optimizer(model, case.variant, 1e-4, **options)
    compiled = model
    if device.type == "cuda":
        compiled = parallel.compiled(model, case.T)
    return model, parallel.wrap(compiled, settings.bucket_mb or None), parallel, optimizer


def case_row(case, settings, runtime):
    """Median seconds of a step and the largest peak of a card, or neither where it does not fit."""
    row = dict(gpus=settings.gpus, **vars(case), step_s=None, tokens_per_s=None, mfu=None)
    row |= dict(peak_GB=None, state_GB=None, predicted_GB=None, loss=None)
    try:
        parts = build(case, settings, runtime)
        seconds, peak, loss = measure(case, settings, runtime, *parts)
        model, optimizer = parts[0], parts[3]
        parameters = model.num_params(non_embedding=False)
        config = model.config
        flops = 6 * parameters * case.T + 6 * case.T**2 * config.n_embd * config.n_layer
        total = flops * case.sequences
        row |= dict(
            step_s=round(seconds, 4),
            tokens_per_s=round(case.T * case.sequences / seconds),
            mfu=round(total / seconds / settings.gpus / CHIP, 4),
            peak_GB=peak / 1e9,
            state_GB=state_bytes(optimizer) / 1e9,
            predicted_GB=predicted(case, model, settings, runtime) / 1e9,
            loss=round(loss, 4),
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    parts = None
    if runtime.device_type == "cuda":
        torch.cuda.empty_cache()
    row |= provenance(runtime.device)
    if runtime.is_main:
        print(row, flush=True)
    return row


def measure(case, settings, runtime, model, shared, parallel, optimizer):
    """(median seconds, peak bytes of the fullest card, last loss) of steps."""
    generator = torch.Generator().manual_seed(runtime.data_rank)
    each = max(1, case.sequences // runtime.data_parallel)
    tokens = torch.randint(model.config.vocab_size, (each, case.T + 1), generator=generator)
    x, y = (part.contiguous().to(runtime.device) for part in (tokens[:, :-1], tokens[:, 1:]))
    on_card, times = runtime.device_type == "cuda", []

    def step():
        parallel.begin_micro_batch(last=True)
        with runtime.autocast():
            loss = shared(x, y)[1]
        loss.backward()
        if not case.inside:
            clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        parallel.zero_gradients(optimizer)
        return loss.detach()

    for _ in range(settings.warmup):  # kernels, compilation, the optimizer's state
        loss = step()
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(settings.steps if case.model == "124m" else settings.large_steps):
        synchronize(runtime.device)
        began = time.perf_counter()
        loss = step()
        synchronize(runtime.device)
        times.append(time.perf_counter() - began)
    if on_card:
        peak = float(torch.cuda.max_memory_allocated())
    else:
        with PeakMeter("cpu") as meter:
            step()
        peak = float(meter.peak)
    most = torch.tensor([peak], dtype=torch.float64, device=runtime.device)
    if runtime.world_size > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    mean = runtime.mean_over_processes([loss.item()])[0]
    return statistics.median(times), most.item(), mean


def predicted(case, model, settings, runtime):
    """Bytes of the fullest card, by the formulas of plan.py."""
    total = None
    if runtime.device_type == "cuda":
        total = torch.cuda.get_device_properties(runtime.device).total_memory
    sizes = next(model.parameters()).element_size(), runtime.dtype.itemsize
    run = run_of(case, model.config, settings.gpus, *sizes, runtime.device_type, total)
    return sum(formulas.peak(run)[1].values())


def run_of(case, config, gpus, param_bytes, stream_bytes, device_type, memory):
    """A case as the planner's Run."""
    return Run(
        config,
        max(1, case.sequences // (gpus // case.pieces)),
        case.T,
        variant=case.variant,
        options={"fused_backward": True} if case.inside else {},
        param_bytes=param_bytes,
        stream_bytes=stream_bytes,
        device_type=device_type,
        processes=gpus,
        parallel=case.mode,
        context_parallel=case.pieces,
        device_memory=memory,
        compiled=device_type == "cuda",
    )


# ---------------------------------------------------------------------- pieces of a step


def optimizer_rows(settings, runtime):
    """Seconds of optimizer.step() alone on 8B's shape: muonsn8, and torch.optim.Muon on the same
    linear weights."""
    sharded = "fsdp" if settings.gpus > 1 else "none"
    case = Case("step", "8b", sharded, "muonsn8", 32 if settings.size == "tiny" else 8192, 1)
    rows = []
    for name in ("muonsn8", "torch.optim.Muon"):
        model, _, _, optimizer = build(case, settings, runtime)
        if name != "muonsn8":
            weights = [p for block in model.transformer.h for p in block.parameters()]
            optimizer = torch.optim.Muon([p for p in weights if p.ndim == 2], lr=1e-4)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        times = []
        for _ in range(2 + settings.steps):
            synchronize(runtime.device)
            began = time.perf_counter()
            optimizer.step()
            synchronize(runtime.device)
            times.append(time.perf_counter() - began)
        row = dict(gpus=settings.gpus, **vars(replace(case, variant=name)))
        row |= dict(step_s=round(statistics.median(times[2:]), 4)) | provenance(runtime.device)
        rows.append(row)
        if runtime.is_main:
            print(row, flush=True)
        del model, optimizer
    return rows


def context_rows(settings, runtime):
    """Seconds and peak of one block's forward and backward, its sequence on all cards: by our ring,
    and by torch's context_parallel around the untiled block."""
    from torch.distributed.tensor.experimental import context_parallel

    shape = SHAPES[settings.size]["8b"] | dict(n_layer=1)
    N, rows = settings.gpus, []
    mesh = dist.init_device_mesh("cuda", (N,))
    for T in (65536, 262144):
        for name in ("ours", "torch"):
            torch.manual_seed(0)
            model = GPT(GPTConfig(**shape, block_size=T)).to(runtime.device, torch.bfloat16)
            block = model.transformer.h[0]
            if name == "ours":
                cut_sequences(model, [block], N)
            x = torch.randn(1, T // N, 4096, device=runtime.device, dtype=torch.bfloat16)
            x.requires_grad_()

            def step(block=block, x=x, name=name):
                if name == "ours":
                    block(x).sum().backward()
                    return
                with context_parallel(mesh):
                    block.plain(x).sum().backward()

            times = []
            for _ in range(4):
                torch.cuda.reset_peak_memory_stats()
                synchronize(runtime.device)
                began = time.perf_counter()
                step()
                synchronize(runtime.device)
                times.append(time.perf_counter() - began)
            row = dict(gpus=N, stage="context", model="8b", mode=name, T=T, pieces=N)
            row |= dict(
                step_s=round(statistics.median(times[1:]), 4),
                peak_GB=torch.cuda.max_memory_allocated() / 1e9,
            )
            rows.append(row | provenance(runtime.device))
            if runtime.is_main:
                print(rows[-1], flush=True)
            del model, block, x
    return rows


def main():
    settings, _ = parse_config(Settings)
    if settings.size not in SHAPES:
        raise UserError(f"size is full or tiny, not {settings.size!r}")
    if unknown := set(settings.stages.split(",")) - {*STAGES}:
        raise UserError(f"unknown stages {', '.join(unknown)}; there are {', '.join(STAGES)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(settings, port), nprocs=settings.gpus)


if __name__ == "__main__":
    exit_cleanly(main)
