"""Do sums of gradients in 8 or 4 bits cost loss, and what does each way of adding up keep?

    python data/shakespeare_char/prepare.py
    python -m experiments.optimizers.accumulation

The seed setup of many_runs.py (0.8M parameters), its 12 sequences taken as four micro-batches of
three. Each seed has one initial model and one order of tokens for every way; rates are the
variants' own. A loss is the last validation loss over the whole split; differences to sums in
float32 are paired by seed. Rows that the CSV has are not run again, and workers share the machine.

Writes a row a run to results/accumulation.csv.
"""

import concurrent.futures
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import parse_config
from experiments.optimizers.many_runs import (
    SETUPS,
    data_order,
    read_text,
    schedule,
    set_learning_rates,
)
from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from experiments.shared.paired import mean_interval, paired_difference
from leangpt.optim import build_optimizer, frees_gradients, state_bytes
from leangpt.system.errors import UserError, exit_cleanly
from model import GPT

WAYS = {  # name: dtype of the weights, bits of the sums (None: p.grad, in the weights' dtype)
    "float32": (torch.float32, None),
    "float32_8": (torch.float32, 8),
    "float32_4": (torch.float32, 4),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16_8": (torch.bfloat16, 8),
    "bfloat16_4": (torch.bfloat16, 4),
}
REFERENCES = {"float32_8": "float32", "float32_4": "float32"}  # else: bfloat16's own sums
MICRO_BATCHES = 4


@dataclass
class Settings:
    input: str = "data/shakespeare_char"  # prepared dataset, or a text file
    variants: str = "adamsn8,muonsn8"  # of optimizers.VARIANTS, by commas
    ways: str = ",".join(WAYS)  # of adding gradients up, by commas
    seeds: int = 15  # numbered from 1
    iterations: int = 0  # shorter runs, to try things; 0: the setup's 2,000
    workers: int = 1  # processes
    minutes: float = 0.0  # start no run after this time; 0: no limit. Run again to go on
    out: str = str(RESULTS / "accumulation.csv")  # rows are added to this file
    device: str = "cpu"  # cpu | cuda

    def __post_init__(self):
        if unknown := set(self.ways.split(",")) - set(WAYS):
            raise UserError(f"unknown ways {', '.join(sorted(unknown))}: use {', '.join(WAYS)}")
        if self.seeds < 1 or self.workers < 1:
            raise UserError("seeds and workers must be at least 1")


def train(settings, variant, way, seed):
    """One run -> its row."""
    torch.set_num_threads(1)
    setup, (dtype, bits) = SETUPS["seed"], WAYS[way]
    text, device = read_text(settings.input, setup.model["block_size"]), settings.device
    T, iterations = setup.model["block_size"], settings.iterations or setup.iterations
    torch.manual_seed(seed)
    model = GPT(setup.config(text.vocab_size)).to(device, dtype)
    options = dict(gradient_bits=bits, grad_clip=setup.clip) if bits else {}
    optimizer = build_optimizer(
        model, variant, weight_decay=setup.weight_decay, betas=setup.betas, **options
    )
    order, train, began = data_order(setup, text, seed), text.train.to(device), time.perf_counter()
    for iteration in range(iterations):
        set_learning_rates([optimizer], schedule(setup, iteration * setup.iterations // iterations))
        for starts in order[iteration].chunk(MICRO_BATCHES):
            rows = torch.stack([train[a : a + T + 1] for a in starts])
            (model(rows[:, :-1], rows[:, 1:])[1] / MICRO_BATCHES).backward()
        if not frees_gradients(optimizer):
            torch.nn.utils.clip_grad_norm_(model.parameters(), setup.clip)
        optimizer.step()
        optimizer.zero_grad()
    numbers = sum(p.numel() for p in model.parameters())
    sums = dtype.itemsize if bits is None else optimizer.strategy.bytes_of(model.lm_head.weight)
    sums = sums if bits is None else sums / model.lm_head.weight.numel()
    return dict(
        variant=variant,
        way=way,
        seed=seed,
        iterations=iterations,
        micro_batches=MICRO_BATCHES,
        val_loss=round(validation_loss(model, text.val.to(device), T), 6),
        weight_bytes=dtype.itemsize,
        sum_bytes=round(sums, 4),
        state_bytes=round(state_bytes(optimizer) / numbers, 4),
        seconds=round(time.perf_counter() - began, 1),
        **provenance(device),
    )


@torch.no_grad()
def validation_loss(model, tokens, T):
    """Mean loss over all whole blocks of T tokens."""
    model.eval()
    blocks = (len(tokens) - 1) // T
    x = tokens[: blocks * T].view(blocks, T)
    y = tokens[1 : blocks * T + 1].view(blocks, T)
    parts = [len(a) * model(a, b)[1].double() for a, b in zip(x.split(256), y.split(256))]
    return float(sum(parts) / blocks)


def summary(rows):
    """A line for each variant and way: bytes per parameter, loss, difference to its reference."""
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = {}
        for row in rows:
            if row["variant"] == variant:
                found.setdefault(row["way"], {})[row["seed"]] = row
        for way, mine in found.items():
            losses = [row["val_loss"] for row in mine.values()]
            mean, half = mean_interval(losses)
            line = f"{variant:<8} {way:<11} {len(mine):>3} seeds, loss {mean:.4f} ± {half:.4f}"
            one = next(iter(mine.values()))
            line += f", {one['weight_bytes']} + {one['sum_bytes']} + {one['state_bytes']} bytes"
            other = found.get(REFERENCES.get(way, "bfloat16" if way != "bfloat16" else "float32"))
            shared = sorted(mine.keys() & other.keys()) if other and way != "float32" else []
            if shared:
                pair = [[rows[s]["val_loss"] for s in shared] for rows in (mine, other)]
                difference, half, p = paired_difference(*pair)
                line += f"; {difference:+.4f} ± {half:.4f} (p {p:.2f}) to {other[shared[0]]['way']}"
            lines.append(line)
    return "\n".join(lines)


def main(argv=None):
    settings, _ = parse_config(Settings, argv)
    out, began = Path(settings.out), time.monotonic()
    rows = read_csv(out) if out.exists() else []
    keys = ("variant", "way", "seed", "iterations")
    iterations = settings.iterations or SETUPS["seed"].iterations
    done = {tuple(row[key] for key in keys) for row in rows}
    wanted = [
        (variant, way, seed)
        for seed in range(1, settings.seeds + 1)
        for variant in settings.variants.split(",")
        for way in settings.ways.split(",")
        if (variant, way, seed, iterations) not in done
    ]
    read_text(settings.input, 1)  # before any process is started
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(settings.workers, context) as pool:
        while wanted:
            if settings.minutes and time.monotonic() - began > 60 * settings.minutes:
                break
            now, wanted = wanted[: settings.workers], wanted[settings.workers :]
            rows += pool.map(train, [settings] * len(now), *zip(*now))
            write_csv(out, rows)
            print(f"{len(rows)} runs, {len(wanted)} to go", flush=True)
    print(summary([row for row in rows if row["iterations"] == iterations]))


if __name__ == "__main__":
    exit_cleanly(main)
