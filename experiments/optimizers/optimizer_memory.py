"""Memory of training on one GPU: GPT-2 XL under every variant, and the largest GPT that fits.

    python -m experiments.optimizers.optimizer_memory --part=variants
    python -m experiments.optimizers.optimizer_memory --part=largest

variants  GPT-2 XL's shape (1.56B parameters), batch 1, T=1024: three whole steps each. The state
          is counted by `state_bytes` and, apart from it, as the difference the allocator shows.
largest   bfloat16 weights rounded stochastically, momentum of few bits, every weight updated inside
          backward, layers checkpointed: larger and larger models, three steps each on one batch,
          whose loss must fall, until one does not fit.

Every case runs in a process of its own, `workers` of them side by side; a process's peak is its
own all the same, but seconds are kept only of one at a time. Writes results/optimizer_memory.csv;
rows of the other part stay.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import parse_config
from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from leangpt.memory.meter import PeakMeter, tensor_bytes
from leangpt.optim import build_optimizer, state_bytes
from leangpt.system.errors import UserError, exit_cleanly, is_out_of_memory
from leangpt.system.timing import timed
from model import GPT, GPTConfig

STEPS = 3
SHAPES = {  # (layers, heads, width)
    "tiny": (2, 2, 64),
    "124m": (12, 12, 768),
    "xl": (48, 25, 1600),
    "7b": (32, 32, 4096),
    "13b": (40, 40, 5120),
    "18b": (40, 48, 6144),
    "20b": (44, 48, 6144),
    "22b": (48, 48, 6144),
    "23b": (51, 48, 6144),
    "24b": (53, 48, 6144),
    "25b": (55, 48, 6144),
}

VARIANTS = (  # (variant, weights, updated inside backward)
    ("adam", "float32", False),
    ("adamsn", "float32", False),
    ("adafactor", "float32", False),
    ("muonsn", "float32", False),
    ("adamsn8", "float32", False),
    ("muonsn8", "float32", False),
    ("muonsn4", "float32", False),
    ("muonsn0", "float32", False),
    ("adamsn8", "bfloat16", False),
    ("muonsn8", "bfloat16", False),
    ("muonsn4", "bfloat16", False),
    ("adamsn8", "bfloat16", True),
    ("muonsn8", "bfloat16", True),
    ("muonsn4", "bfloat16", True),
    ("adafactor", "bfloat16", True),
)


@dataclass
class Settings:
    part: str = "variants"  # variants | largest
    shape: str = "xl"  # of part=variants: tiny | 124m | xl | 7b
    sizes: str = "13b,20b,22b,24b,25b"  # of part=largest, tried in this order
    low_byte: str = "muonsn8"  # variant of part=largest
    block_size: int = 1024  # tokens; the batch is 1
    workers: int = 1  # processes side by side
    device: str = "auto"  # auto | cpu | cuda
    out: str = str(RESULTS / "optimizer_memory.csv")  # rows of this part are replaced


def run_case(shape, variant, dtype, fused, T, checkpoint, device):
    """Build, train STEPS steps on one batch -> a dict of bytes, losses and seconds; or why not."""
    layers, heads, width = SHAPES[shape]
    config = GPTConfig(
        block_size=T,
        vocab_size=50304,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        checkpoint_layers=checkpoint,
    )
    result = dict(
        shape=shape,
        variant=variant,
        weights=dtype,
        fused_backward=fused,
        tokens=T,
        checkpoint_layers=checkpoint,
    )
    try:
        with PeakMeter(device) as meter:
            result |= train(config, variant, getattr(torch, dtype), fused, device)
            meter.tick()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return result | dict(fits=False)
    result["peak_bytes"] = meter.peak
    result["peak_per_parameter"] = round(meter.peak / result["parameters"], 3)
    return result


def train(config, variant, dtype, fused, device):
    """The steps of run_case; models in bfloat16 are initialised on the device, in bfloat16."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = GPT(config)
    finally:
        torch.set_default_dtype(before)
    options = dict(fused_backward=True) if fused else {}
    optimizer = build_optimizer(model, variant, learning_rate=2e-4, embedding_lr=2e-4, **options)
    text = torch.randint(50257, (1, config.block_size + 1), device=device)
    losses, seconds, numbers = [], [], {}

    def step():
        with torch.autocast(
            torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == torch.float32
        ):
            _, loss = model(text[:, :-1], text[:, 1:])
        loss.backward()
        losses.append(loss.item())
        held = allocated(device)
        optimizer.step()
        if not numbers:  # the first step makes the state
            numbers["allocator_state_bytes"] = None if fused else allocated(device) - held
            numbers["gradient_bytes"] = tensor_bytes(
                p.grad for p in model.parameters() if p.grad is not None
            )
        optimizer.zero_grad(set_to_none=True)

    for _ in range(STEPS):
        seconds.append(timed(step, device))
    parameters = sum(p.numel() for p in model.parameters())
    state, weights = state_bytes(optimizer), tensor_bytes(model)
    return dict(
        fits=True,
        parameters=parameters,
        weight_bytes=weights,
        state_bytes=state,
        **numbers,
        bytes_per_parameter=round((weights + numbers["gradient_bytes"] + state) / parameters, 3),
        loss_first=round(losses[0], 4),
        loss_last=round(losses[-1], 4),
        step_seconds=round(seconds[-1], 3),
    )


def allocated(device):
    """Bytes the CUDA allocator has given out; 0 elsewhere."""
    return torch.cuda.memory_allocated() if torch.device(device).type == "cuda" else 0


def cases_of(settings, device):
    """Arguments of run_case, in order."""
    if settings.part == "variants":
        if settings.shape not in SHAPES:
            raise UserError(f"unknown shape {settings.shape!r}; known: {', '.join(SHAPES)}")
        return [(settings.shape, *case, settings.block_size, False, device) for case in VARIANTS]
    if settings.part != "largest":
        raise UserError(f"unknown part {settings.part!r}; choose variants or largest")
    sizes = settings.sizes.split(",")
    if unknown := [size for size in sizes if size not in SHAPES]:
        raise UserError(f"unknown size {unknown[0]!r}; known: {', '.join(SHAPES)}")
    return [
        (size, settings.low_byte, "bfloat16", True, settings.block_size, True, device)
        for size in sizes
    ]


def main():
    settings, _ = parse_config(Settings)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(settings.out)
    kept = [row for row in (read_csv(out) if out.exists() else []) if row["part"] != settings.part]
    rows = []
    # a fresh process for every case, so that nothing of an earlier one remains
    pool = ProcessPoolExecutor(
        settings.workers, max_tasks_per_child=1, mp_context=multiprocessing.get_context("spawn")
    )
    jobs = [pool.submit(run_case, *case) for case in cases_of(settings, device)]
    for job in jobs:
        row = dict(part=settings.part) | job.result()
        if settings.workers > 1:
            row["step_seconds"] = None
        rows.append(row | provenance(device))
        columns = dict.fromkeys(name for row in kept + rows for name in row)
        write_csv(out, [{name: row.get(name) for name in columns} for row in kept + rows])
        label = f"{row['shape']:5s} {row['variant']:10s} {row['weights']:9s}"
        label += " in backward" if row["fused_backward"] else " " * 12
        if not row["fits"]:
            print(f"{label} does not fit", flush=True)
            if settings.part == "largest":
                break
            continue
        print(
            f"{label} peak {row['peak_bytes'] / 2**30:6.2f} GiB, weights + gradients + state "
            f"{row['bytes_per_parameter']:6.3f} bytes per parameter, state {row['state_bytes']:,} "
            f"(allocator {row['allocator_state_bytes']}), loss {row['loss_first']:.3f} -> "
            f"{row['loss_last']:.3f}, {row['step_seconds']} s a step",
            flush=True,
        )
    pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    exit_cleanly(main)
