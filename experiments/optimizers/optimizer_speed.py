"""Milliseconds of one optimizer step on GPT-2's 124M parameters, against torch's fused AdamW.

    python -m experiments.optimizers.optimizer_speed --device=cuda
    python -m experiments.optimizers.optimizer_speed --device=cpu --threads=2

Each variant steps in turn with torch's fused AdamW on the same float32 weights and gradients, and
the medians of both are kept: a ratio of two numbers taken together survives a machine whose speed
changes. Forward and backward are not part of it.

Writes results/optimizer_speed.csv; rows of other devices stay.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import parse_config
from experiments.optimizers.many_runs import Cohort, Run, Setup, set_learning_rates
from experiments.optimizers.optimizer_variants import (
    build,
    expand,
    is_peer,
    missing_package,
    optimizer_state_bytes,
)
from experiments.optimizers.stacked_gpt import StackedGPT
from experiments.shared.common import RESULTS, interleaved, provenance, read_csv, write_csv
from leangpt.system.errors import UserError, exit_cleanly
from leangpt.system.timing import quartiles, timed

SHAPES = {
    "124m": (50304, dict(block_size=1024, n_layer=12, n_head=12, n_embd=768)),
    "350m": (50304, dict(block_size=1024, n_layer=24, n_head=16, n_embd=1024)),
    "seed": (65, dict(block_size=64, n_layer=4, n_head=4, n_embd=128)),
}
REFERENCE = "torch_adamw"


@dataclass
class Settings:
    variants: str = "ours,peers"  # as optimizer_quality.py's
    shape: str = "124m"  # 124m | 350m | seed
    rounds: int = 15  # steps of each, in turns, after three of warming up
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 2  # processor threads
    out: str = str(RESULTS / "optimizer_speed.csv")  # rows of this shape and device are replaced


def in_turns(reference, step, rounds, device):
    """Seconds of `rounds` calls of each, after three of both."""
    for _ in range(3):
        reference()
        step()
    return interleaved([lambda: timed(reference, device), lambda: timed(step, device)], rounds)


def main():
    settings, _ = parse_config(Settings)
    if settings.shape not in SHAPES:
        raise UserError(f"unknown shape {settings.shape!r}; choose from: {', '.join(SHAPES)}")
    torch.set_num_threads(settings.threads)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    vocab_size, model = SHAPES[settings.shape]
    setup = Setup("speed", model, 1, 1)
    stack = StackedGPT(setup.config(vocab_size), [0], device)
    for weight in stack.weights.values():
        weight.grad.normal_(std=1e-3)
    parameters = sum(weight.numel() for weight in stack.weights.values())

    def stepper(variant):
        """(what steps once, its optimizers)."""
        run = Run(variant, 1e-6, 1e-6, 0)
        optimizers = build([(run, Cohort(stack, 0, 1))], setup)
        set_learning_rates(optimizers, 1.0)

        def step():
            for optimizer in optimizers:
                optimizer.step()

        return step, optimizers

    rows = []
    for variant in expand(settings.variants):
        if package := missing_package(variant):
            print(f"skipped {variant}: the package {package} is not installed")
            continue
        try:
            step, optimizers = stepper(variant)
            times = in_turns(stepper(REFERENCE)[0], step, settings.rounds, device)
        except (RuntimeError, ImportError) as error:
            if not is_peer(variant):
                raise
            print(f"skipped {variant}: {type(error).__name__}: {str(error)[:100]}")
            continue
        (base, _), (mine, spread) = (quartiles([1e3 * t for t in column]) for column in times)
        rows.append(
            dict(
                shape=settings.shape,
                parameters=parameters,
                device=device,
                variant=variant,
                step_ms=round(mine, 3),
                spread_ms=round(spread, 3),
                adamw_ms=round(base, 3),
                ratio=round(mine / base, 3),
                state_bytes=optimizer_state_bytes(variant, optimizers),
                rounds=settings.rounds,
                **provenance(device),
            )
        )
        print(
            f"{variant:44s} {mine:9.2f} ms (spread {spread:.2f}), fused AdamW {base:.2f} ms: "
            f"{mine / base:.2f} times",
            flush=True,
        )
        del step, optimizers  # its state
    out = Path(settings.out)
    kept = [
        row
        for row in (read_csv(out) if out.exists() else [])
        if (row["shape"], row["device"]) != (settings.shape, device)
    ]
    write_csv(out, kept + rows)


if __name__ == "__main__":
    exit_cleanly(main)
