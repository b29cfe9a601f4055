"""One training step of GPT-2 124M over a long sequence on the CPU -> results/long_training.csv

    python -m experiments.attention.long_training --length=16384

Everything is counted in the peak: weights, gradients, optimizer state, activations, the loss. The
step is the second one, when the optimizer's state stands. float32, batch 1, AdamW.
"""

import time
from dataclasses import dataclass

import torch

from configurator import parse_config
from experiments.shared.common import RESULTS, provenance, write_csv
from leangpt.memory.meter import PeakMeter
from leangpt.optim import build_optimizer
from leangpt.system.errors import exit_cleanly
from model import GPT, GPTConfig


@dataclass
class Settings:
    length: int = 16384  # tokens of the one sequence
    plain: bool = False  # the untiled model too (about 16 GB at 16,384 tokens)
    steps: int = 2  # steps taken; the last one is timed
    n_layer: int = 12  # blocks
    n_embd: int = 768  # width; 64 a head
    out: str = str(RESULTS / "long_training.csv")  # where the rows go


def step_row(settings, name, **config):
    """Peak bytes of building a model and training it, and the last step's seconds and loss."""
    T = settings.length
    with PeakMeter("cpu") as meter:
        torch.manual_seed(0)
        model = GPT(
            GPTConfig(
                block_size=T,
                n_layer=settings.n_layer,
                n_embd=settings.n_embd,
                n_head=settings.n_embd // 64,
                position="none",
                **config,
            )
        )
        optimizer = build_optimizer(model, "adam", learning_rate=6e-4)
        idx = torch.randint(50257, (1, T))
        for _ in range(settings.steps):
            start = time.perf_counter()
            _, loss = model(idx, idx.roll(-1, 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meter.tick()
            taken = time.perf_counter() - start
    return {
        "name": name,
        "T": T,
        "step_s": round(taken, 2),
        "peak_GB": meter.peak / 1e9,
        "loss": loss.item(),
        "parameters": model.num_params(non_embedding=False),
    }


def main():
    settings, _ = parse_config(Settings)
    cases = {
        "recompute": dict(attention_policy="recompute", q_chunk=4096),
        "recompute, checkpoint_layers": dict(
            attention_policy="recompute", q_chunk=4096, checkpoint_layers=True
        ),
    }
    if settings.plain:
        cases = {"plain": {}, **cases}
    rows = []
    for name, config in cases.items():
        rows.append({**step_row(settings, name, **config), **provenance()})
        print(rows[-1], flush=True)
        write_csv(settings.out, rows)


if __name__ == "__main__":
    exit_cleanly(main)
