"""Plans of the table of cards, trained with a card's memory -> results/plan_cards_checked.csv.

    python -m experiments.plan.cards_check                  on every GPU there is, half an hour
    python -m experiments.plan.cards_check --goals=fastest  three minutes

Of each model the fastest plan and the one of the longest context, on the smallest card that has
one: a GPU whose allocator may take no more than that card has beside CUDA's own. Two steps each as
train.py makes them, of random tokens; the second is timed, where the first took less than a minute.
Rows of plans that are still the same stay: it goes on where it was stopped.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from configurator import parse_config
from experiments.plan.accuracy import settings_of
from experiments.plan.cards import MODELS
from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from leangpt.memory.goals import LADDERS
from leangpt.memory.search import CONTEXT
from leangpt.system.errors import exit_cleanly, is_out_of_memory
from leangpt.system.runtime import setup_runtime, use_expandable_segments
from leangpt.system.timing import timed
from leangpt.text.folder import write_dataset

PATIENCE = 60  # seconds of a first step after which there is no second


@dataclass
class Options:
    plans: str = str(RESULTS / "plan_cards.csv")
    csv: str = str(RESULTS / "plan_cards_checked.csv")  # where rows go
    models: str = ",".join(MODELS)  # of the table
    goals: str = "fastest,longest"  # of each
    device: str = "cuda"  # cuda | cpu
    number: int = -1  # of a worker: its check; -1: this is none


def main(argv=None):
    options, _ = parse_config(Options, argv, config_files=False)
    goals = options.goals.split(",")
    found = checks(read_csv(options.plans), options.models.split(","), goals)
    if options.number >= 0:
        with tempfile.TemporaryDirectory() as folder:
            row = run_check(found[options.number], options.device, Path(folder))
        write_csv(f"{options.csv}.{options.number}", [row])
        return
    before = read_csv(options.csv) if Path(options.csv).exists() else []
    known = {key_of(row) for row in before}
    gpus, running = max(1, torch.cuda.device_count()), {}
    waiting = [n for n, check in enumerate(found) if key_of_check(check) not in known]
    while waiting or running:
        for gpu in range(gpus):
            if gpu in running and running[gpu].poll() is not None:
                del running[gpu]
            if gpu not in running and waiting:
                running[gpu] = start(options, waiting.pop(0), gpu)
        time.sleep(0.2)
    parts = [Path(f"{options.csv}.{number}") for number in range(len(found))]
    rows = [row for part in parts if part.exists() for row in read_csv(part)]
    newest = {(row["model"], row["goal"]): row for row in before + rows}
    write_csv(options.csv, list(newest.values()))
    for part in parts:
        part.unlink(missing_ok=True)


def key_of(row):
    """What tells a check from others."""
    return row["model"], row["goal"], row["card_GB"], row["flags"]


def key_of_check(check):
    """The same, of what is still to be checked."""
    model, goal, row = check
    return model, goal, row["card_GB"], row[f"{'longest_' * (goal == 'longest')}flags"]


def checks(rows, models, goals=("fastest", "longest")):
    """(model, goal, row of the plans) of what is trained: quick ones first, then large models."""
    found = []
    for goal, column in (("fastest", "flags"), ("longest", "longest_flags")):
        for model in reversed(models) if goal in goals else ():
            fits = [row for row in rows if row["model"] == model and row[column]]
            found.append((model, goal, min(fits, key=lambda row: row["card_GB"])))
    return found


def start(options, number, gpu):
    """A process that makes one check on one GPU."""
    command = [sys.executable, "-m", "experiments.plan.cards_check", f"--number={number}"]
    command += [
        f"--{n}={getattr(options, n)}" for n in ("plans", "csv", "models", "goals", "device")
    ]
    return subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)})


def run_check(check, device, folder):
    """One plan, trained -> its row."""
    model, goal, row = check
    longest = "longest_" * (goal == "longest")
    flags, card = row[f"{longest}flags"], row["card_GB"]
    family, rung, length, _ = MODELS[model]
    run = dict(seed=0, number=0, block_size=length) | LADDERS[family][rung] | as_dict(flags)
    run.setdefault("vocab_size", train.GPTConfig().vocab_size)
    write_tokens(folder / str(run["vocab_size"]), run["vocab_size"], run["block_size"])
    found = {"model": model, "card_GB": card, "goal": goal, "length": run["block_size"]}
    found |= {"flags": flags, "predicted": row[f"{longest}peak"] - CONTEXT}
    found |= {"limit": int(card * 1e9) - CONTEXT, "measured": None, "seconds": None}
    found |= {"tokens_per_s": None, "outcome": "fits"}
    if device == "cuda":
        use_expandable_segments()  # before the allocator's limit is set
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(found["limit"] / total)
    settings = settings_of(run, device, folder)
    dtype = settings.dtype if settings.param_dtype == "float32" else settings.param_dtype
    try:
        trainer = train.Trainer(settings, {}, setup_runtime(device, dtype, settings.seed))
        for _ in range(2):
            seconds = timed(trainer.step, trainer.runtime.device)
            if seconds > PATIENCE:
                break
        tokens = settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
        found |= {"seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds)}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found["outcome"] = "out of memory"
    if device == "cuda":
        found["measured"] = torch.cuda.max_memory_allocated()
    print(found, flush=True)
    return found | provenance(device)


def as_dict(flags):
    """train.py's flags -> settings."""
    _, given = parse_config(train.Settings, flags.split(), config_files=False)
    return given


def write_tokens(folder, vocab_size, length):
    """Random tokens, enough for two steps of one sequence."""
    random = np.random.default_rng(0)
    train_ids, val_ids = (
        random.integers(0, vocab_size, count * length + 1, dtype=np.int64) for count in (3, 1)
    )
    meta = {"tokenizer": "none", "vocab_size": vocab_size, "source": "a generator", "sha256": None}
    write_dataset(folder, train_ids, val_ids, meta)


if __name__ == "__main__":
    exit_cleanly(main)
