"""Many recipes of an optimizer side by side, as one CUDA graph: what the *_search.py scripts share.

An optimizer under search is a few lines over stacked replicas (stacked_gpt.py) with switches for
everything that might help. Forward, backward and all updates are recorded once and replayed.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments.optimizers.many_runs import (
    SETUPS,
    data_order,
    read_text,
    schedule,
    validation_losses,
)
from experiments.optimizers.stacked_gpt import StackedGPT, Step
from experiments.shared.common import provenance, read_csv, write_csv
from leangpt.system.errors import UserError


def recipes_of(names, groups, spelt=None):
    """'final,rank 1' or 'all' -> {name: recipe}: groups, and recipes by their names.

    groups: {group: {name: recipe}}. spelt(name) -> the recipe that a name with "=" spells out.
    Raises UserError for an unknown name.
    """
    every = {name: recipe for group in groups.values() for name, recipe in group.items()}
    chosen = {}
    for name in names.split(","):
        if name in ("all", *groups):
            chosen |= every if name == "all" else groups[name]
        elif name in every:
            chosen[name] = every[name]
        elif spelt and "=" in name:
            chosen[name] = spelt(name)
        else:
            raise UserError(
                f"unknown recipe {name!r}; known: all, {', '.join(groups)}, and the "
                "names in the search's CSV in results/"
            )
    return chosen


class Clock:
    """Iteration-dependent numbers as tensors on the device, so that a graph can be replayed."""

    def __init__(self, setup, device):
        shares = [schedule(setup, i) for i in range(setup.iterations)]
        self.shares = torch.tensor(shares, device=device)
        self.iteration = torch.zeros(1, dtype=torch.int64, device=device)
        self.iterations = setup.iterations

    def tick(self):
        """Read the numbers of this iteration."""
        now = self.iteration.clamp(max=self.iterations - 1)
        self.share = self.shares.index_select(0, now)[0]
        self.time = self.iteration[0].float() + 1

    def correction(self, beta):
        """Adam's 1 - beta^t."""
        return 1 - beta**self.time


def run_batch(setup, runs, text, device, updates_of):
    """Train [(recipe, seed)] side by side -> validation losses. Runs of a recipe are neighbours.

    updates_of(recipe, stack, start, stop) -> what updates those replicas: objects with
    step(clock), whose tensors are their attributes, alone or in lists.
    """
    stack = StackedGPT(setup.config(text.vocab_size), [seed for _, seed in runs], device)
    starts = [i for i, (recipe, _) in enumerate(runs) if i == 0 or recipe != runs[i - 1][0]]
    updates = [
        update
        for start, stop in zip(starts, [*starts[1:], len(runs)])
        for update in updates_of(runs[start][0], stack, start, stop)
    ]
    order = torch.stack([data_order(setup, text, seed) for _, seed in runs], 1).to(device)
    step = Step(
        stack, text.train.to(device), setup.batch_size, setup.model["block_size"], setup.clip
    )
    clock = Clock(setup, device)

    def iterate():
        clock.tick()
        step(order.index_select(0, clock.iteration.clamp(max=setup.iterations - 1))[0])
        for update in updates:
            update.step(clock)
        clock.iteration += 1

    replay = iterate
    if torch.device(device).type == "cuda":
        replay = record(iterate, stack, updates, clock)
    for _ in range(setup.iterations):
        replay()
    return validation_losses(
        stack, text.val.to(device), setup.model["block_size"], torch.float32
    ).tolist()


def record(iterate, stack, updates, clock):
    """`iterate` as a CUDA graph, with weights, states and clock as before it was first run."""
    tensors = [weight.detach() for weight in stack.weights.values()] + [clock.iteration]
    for update in updates:
        for value in vars(update).values():
            if isinstance(value, torch.Tensor):
                tensors.append(value)
            elif isinstance(value, list):
                tensors += [t for t in value if isinstance(t, torch.Tensor)]
    saved = [tensor.clone() for tensor in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            iterate()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate()
    for tensor, old in zip(tensors, saved):
        tensor.copy_(old)
    return graph.replay


@dataclass
class Settings:
    input: str = "data/shakespeare_char"  # prepared dataset, or a text file
    recipes: str = ""  # comma separated names of the script's recipes; default: all
    out: str = ""  # rows are added to this file; default: the script's in results/
    first_seed: int = 1
    seeds: int = 3  # runs a recipe
    replicas: int = 63  # most runs side by side
    iterations: int = 0  # shorter runs, to try things; 0: the setup's
    device: str = "auto"  # auto | cpu | cuda


def search(settings, named, updates_of, out, columns_of):
    """Run every recipe of {name: recipe} on every seed that the CSV lacks; print means, best first.

    columns_of(recipe) -> dict of columns that a row has beside its name, seed and loss.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    setup = SETUPS["seed"]
    if settings.iterations:
        setup = replace(setup, iterations=settings.iterations, warmup=settings.iterations // 10)
    text = read_text(settings.input, setup.model["block_size"])
    out = Path(settings.out or out)
    rows = read_csv(out) if out.exists() else []
    done = {(row["recipe"], row["seed"]) for row in rows}
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    todo = [(name, seed) for name in named for seed in seeds if (name, seed) not in done]
    started = time.perf_counter()
    for first in range(0, len(todo), settings.replicas):
        batch = todo[first : first + settings.replicas]
        losses = run_batch(
            setup, [(named[name], seed) for name, seed in batch], text, device, updates_of
        )
        rows += [
            dict(
                recipe=name,
                seed=seed,
                val_loss=round(loss, 6),
                iterations=setup.iterations,
                **columns_of(named[name]),
                **provenance(device),
            )
            for (name, seed), loss in zip(batch, losses)
        ]
        write_csv(out, rows)
        print(f"{time.perf_counter() - started:6.0f} s: {len(rows)} rows", flush=True)
    means = {}
    for row in rows:
        means.setdefault(row["recipe"], []).append(row["val_loss"])
    for name, values in sorted(means.items(), key=lambda item: sum(item[1]) / len(item[1])):
        print(f"{sum(values) / len(values):.4f}  {len(values)} seeds  {name}")
