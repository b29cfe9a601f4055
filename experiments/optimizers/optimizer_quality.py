"""Which optimizer reaches the lowest loss on equal tokens, when each is tuned on the same grid?

    python data/shakespeare_char/prepare.py
    python -m experiments.optimizers.optimizer_quality
    python -m experiments.optimizers.optimizer_quality \
        --variants=torch_adamw,muonsn:momentum_bits=8 ...

Every variant runs the grid of linear x embedding learning rates with `grid_seeds` seeds each. While
a neighbour of the best setting (a factor of 2 away in either rate) is untested, it is run too, so
that no optimum lies on an edge. The best setting is then rerun on fresh seeds, which alone enter
the summary: mean and 95% interval, and the difference to tuned AdamW paired by seed (same initial
weights, same tokens). Runs already in the CSV are not run again; a variant is a name of
optimizers.VARIANTS with options (`adamsn:norm=sum+partition=larger`), or one of peers.PEERS.

Writes every run to results/optimizer_quality.csv and the summary beside it.
"""

import concurrent.futures
import math
import multiprocessing
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configurator import parse_config
from experiments.optimizers.many_runs import SETUPS, Run, read_text, train_runs
from experiments.optimizers.optimizer_variants import (
    build,
    expand,
    grid,
    is_peer,
    missing_package,
    state_of_one,
)
from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from experiments.shared.paired import mean_interval, paired_difference
from leangpt.system.errors import UserError, exit_cleanly

REFERENCE = "torch_adamw"
FRESH = 1000  # fresh seeds are numbered from here
CLIMBS = 4  # largest number of times a grid is extended


@dataclass
class Settings:
    input: str = "data/shakespeare_char"  # prepared dataset, or a text file
    variants: str = "ours,peers"  # ours | peers | ablation_* | name[:key=value+...], by commas
    setup: str = "seed"  # seed | seed_bf16 | seed_fused | ... | char384 | bpe51m, see many_runs.py
    out: str = str(RESULTS / "optimizer_quality.csv")  # rows are added to this file
    grid_seeds: int = 2  # seeds of each grid setting
    confirm_seeds: int = 5  # fresh seeds of the best setting; 0: the grid alone
    linear_lrs: str = ""  # comma separated, instead of the variant's grid
    embedding_lrs: str = ""  # comma separated, instead of the variant's grid
    climb: bool = True  # extend the grid until the best setting is inside it
    replicas: int = 64  # most runs side by side
    workers: int = 0  # processes sharing the device; 0: three on CUDA, one on the CPU
    minutes: float = 0.0  # start no batch after this time; 0: no limit. Run again to go on
    iterations: int = 0  # shorter runs, to try things; 0: the setup's
    dtype: str = ""  # float32 | bfloat16 | tf32 instead of the setup's
    device: str = "auto"  # auto | cpu | cuda


def grid_settings(variant, settings):
    """The (linear, embedding) learning rates every variant starts from, a factor of 2 apart."""
    linear, embedding = grid(variant)
    if settings.linear_lrs:
        linear = [float(rate) for rate in settings.linear_lrs.split(",")]
    if settings.embedding_lrs:
        embedding = [float(rate) for rate in settings.embedding_lrs.split(",")]
    return [(a, b) for a in linear for b in embedding]


def next_runs(variant, rows, settings):
    """Runs that a variant still needs, given the rows there are; [] when it is finished."""
    done = {}  # (linear lr, embedding lr) -> {seed: loss}
    for row in rows:
        if row["variant"] == variant:
            key = row["learning_rate"], row["embedding_lr"]
            done.setdefault(key, {})[row["seed"]] = row["best_val_loss"]
    seeds = range(1, settings.grid_seeds + 1)

    def lacking(points, seeds):
        return [
            Run(variant, *point, seed)
            for point in points
            for seed in seeds
            if seed not in done.get(point, {})
        ]

    fresh = range(FRESH + 1, FRESH + 1 + settings.confirm_seeds)
    points = grid_settings(variant, settings)
    if len(points) == 1 and not settings.climb:  # nothing to choose from
        return lacking(points, fresh)
    if runs := lacking(points, seeds):
        return runs
    best = best_setting(done, seeds)
    if settings.climb and climbs(points, best) < CLIMBS:
        linear, embedding = best
        neighbours = [
            (linear * 2, embedding),
            (linear / 2, embedding),
            (linear, embedding * 2),
            (linear, embedding / 2),
        ]
        if runs := lacking(neighbours, seeds):
            return runs
    return lacking([best], fresh)


def best_setting(done, seeds):
    """The learning rates with the lowest mean over the grid's seeds; diverged runs are infinite."""

    def mean(point):
        losses = [done[point].get(seed, math.inf) for seed in seeds]
        return sum(math.inf if loss is None or math.isnan(loss) else loss for loss in losses)

    return min(done, key=mean)


def climbs(points, best):
    """How many factors of 2 `best` lies outside the first grid."""
    outside = 0.0
    for axis in (0, 1):
        rates = [point[axis] for point in points]
        outside = max(
            outside, math.log2(best[axis] / max(rates)), math.log2(min(rates) / best[axis])
        )
    return outside


def batches(runs, replicas, workers):
    """Runs dealt into batches: ours together, every peer's alone, so that one cannot stop us."""
    families = {}
    for run in sorted(runs):
        families.setdefault(run.variant if is_peer(run.variant) else "ours", []).append(run)
    for family in families.values():
        size = min(replicas, max(12, math.ceil(len(family) / workers)))
        for start in range(0, len(family), size):
            yield family[start : start + size]


def work(setup, runs, path, device, precision):
    """One batch, in a worker process: rows of results with the state's size added."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    text = read_text(path, setup.model["block_size"])
    state = {
        variant: state_of_one(variant, setup, text, device)
        for variant in sorted({run.variant for run in runs})
    }
    label = f"{len(runs)} x {', '.join(state)}"

    def report(iteration, loss):
        print(f"    {label[:60]}: iteration {iteration}, training loss {loss:.4f}", flush=True)

    rows = train_runs(setup, runs, text, build, device, report=report)
    return [
        row | state[row["variant"]] | dict(precision=precision, sha256=text.sha256[:16])
        for row in rows
    ]


def summarise(rows):
    """One row a variant from its fresh seeds, two or more, sorted by loss.

    All of one setting of learning rates: where there are fresh seeds of several, that with the
    most; of as many, the one run last.
    """
    fresh = {}
    for row in rows:
        if row["seed"] > FRESH:
            rates = row["learning_rate"], row["embedding_lr"]
            settings = fresh.setdefault((row["setup"], row["iterations"], row["variant"]), {})
            settings.setdefault(rates, []).append(row)
    fresh = {key: max(reversed(settings.values()), key=len) for key, settings in fresh.items()}
    table = []
    for (setup, iterations, variant), mine in fresh.items():
        if len(mine) < 2:  # its runs are not finished
            continue
        reference = {
            row["seed"]: row["best_val_loss"]
            for row in fresh.get((setup, iterations, REFERENCE), [])
        }
        losses = {row["seed"]: row["best_val_loss"] for row in mine}
        common = sorted(losses.keys() & reference.keys())
        mean, half = mean_interval(list(losses.values()))
        difference, difference_half, p = (
            paired_difference([losses[seed] for seed in common], [reference[s] for s in common])
            if common
            else (math.nan,) * 3
        )
        first = mine[0]
        table.append(
            dict(
                setup=setup,
                iterations=iterations,
                variant=variant,
                learning_rate=first["learning_rate"],
                embedding_lr=first["embedding_lr"],
                seeds=len(losses),
                val_loss=round(mean, 4),
                interval=round(half, 4),
                to_adamw=round(difference, 4),
                to_adamw_interval=round(difference_half, 4),
                p=float(f"{p:.2g}"),
                state_bytes=first["state_bytes"],
                state_percent=round(100 * first["state_bytes"] / (8 * first["parameters"]), 2),
            )
        )
    return sorted(table, key=lambda row: (row["setup"], row["iterations"], row["val_loss"]))


def print_table(table):
    """The summary, a line a variant."""
    print(
        f"{'variant':44s} {'linear':>8s} {'embed':>8s} {'val loss':>17s} {'to AdamW':>18s} "
        f"{'p':>8s} {'state':>7s}"
    )
    for row in table:
        print(
            f"{row['variant'][:44]:44s} {row['learning_rate']:8.2g} {row['embedding_lr']:8.2g} "
            f"{row['val_loss']:.4f} +- {row['interval']:.4f} {row['to_adamw']:+.4f} +- "
            f"{row['to_adamw_interval']:.4f} {row['p']:8.2g} {row['state_percent']:6.1f}%"
        )


def run_all(settings):
    """Run what is missing, a round at a time, adding rows to the CSV after every batch."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    setup, precision = choose_setup(settings)
    read_text(settings.input, setup.model["block_size"])  # a wrong path is an error here and now
    variants = expand(settings.variants)
    out = Path(settings.out)
    rows = read_csv(out) if out.exists() else []
    workers = settings.workers or (3 if device == "cuda" else 1)
    for variant in variants:
        if package := missing_package(variant):
            print(f"skipped {variant}: the package {package} is not installed")
    variants = [variant for variant in variants if not missing_package(variant)]
    columns = provenance(device)
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        while True:
            mine = [
                row
                for row in rows
                if row["setup"] == setup.name and row["iterations"] == setup.iterations
            ]
            runs = [run for variant in variants for run in next_runs(variant, mine, settings)]
            if not runs:
                break
            jobs = {
                pool.submit(work, setup, batch, settings.input, device, precision): batch
                for batch in batches(runs, settings.replicas, workers)
            }
            print(f"{len(runs)} runs in {len(jobs)} batches", flush=True)
            late = False
            for job in concurrent.futures.as_completed(jobs):
                if settings.minutes and time.perf_counter() - started > 60 * settings.minutes:
                    late = True
                    for waiting in jobs:
                        waiting.cancel()
                if job.cancelled():
                    continue
                failed = job.exception()
                if failed:
                    names = {run.variant for run in jobs[job]}
                    print(f"dropped {', '.join(sorted(names))}: {type(failed).__name__}: {failed}")
                    variants = [variant for variant in variants if variant not in names]
                    continue
                rows += [row | columns for row in job.result()]
                write_csv(out, rows)
                print(
                    f"{time.perf_counter() - started:6.0f} s: {len(rows)} rows, best so far "
                    f"{min(row['best_val_loss'] for row in job.result()):.4f} in this batch",
                    flush=True,
                )
            if late:
                print("out of time: run the same command again to go on")
                break
    return rows


def choose_setup(settings):
    """(Setup, precision name) that the settings ask for. Raises UserError."""
    if settings.setup not in SETUPS:
        raise UserError(f"unknown setup {settings.setup!r}; choose from: {', '.join(SETUPS)}")
    setup = SETUPS[settings.setup]
    if settings.iterations:
        setup = replace(
            setup,
            iterations=settings.iterations,
            warmup=min(setup.warmup, settings.iterations // 2),
        )
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "tf32": torch.float32}
    precision = settings.dtype or str(setup.dtype).removeprefix("torch.")
    if precision not in known:
        raise UserError(f"unknown dtype {precision!r}; choose from: {', '.join(known)}")
    return replace(setup, dtype=known[precision]), precision


def main():
    settings, _ = parse_config(Settings)
    rows = run_all(settings)
    table = summarise(rows)
    if table:
        out = Path(settings.out)
        write_csv(out.with_name(out.stem + "_summary.csv"), table)
        print_table(table)


if __name__ == "__main__":
    exit_cleanly(main)
