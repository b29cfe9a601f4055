"""What each card trains, by plan.py: models whole, their longest context -> results/plan_cards.csv.

    python -m experiments.plan.cards                    some ten seconds; nothing is trained

A row a card and model: the fastest plan (GPT-2: nanoGPT's 480 sequences of 1,024 tokens a step, a
Llama: one of 8,192), and the plan of the longest context. Optimizers whose measured loss is above
AdamW's are left out. Plans are predictions; accuracy.py holds them against measured peaks.
"""

from dataclasses import dataclass

from configurator import parse_config
from experiments.shared.common import RESULTS, provenance, write_csv
from leangpt.memory.given_up import mean_loss_difference
from leangpt.memory.goals import LADDERS, longest
from leangpt.memory.run import Run
from leangpt.memory.search import Budget, Wish, fastest
from leangpt.system.errors import exit_cleanly
from model import GPTConfig

HOST = {8: 32, 12: 32, 16: 64, 24: 64, 48: 128, 80: 256}  # GB of host memory beside such a card
MODELS = {  # name: (family, name in its ladder, tokens of a sequence, sequences a step)
    "GPT-2 124M": ("gpt2", "124M", 1024, 480),
    "GPT-2 355M": ("gpt2", "355M", 1024, 480),
    "GPT-2 1.5B": ("gpt2", "1.5B", 1024, 480),
    "Llama 1B": ("llama", "meta-llama/Llama-3.2-1B", 8192, 1),
    "Llama 3B": ("llama", "meta-llama/Llama-3.2-3B", 8192, 1),
    "Llama 8B": ("llama", "meta-llama/Llama-3.1-8B", 8192, 1),
}


@dataclass
class Settings:
    csv: str = str(RESULTS / "plan_cards.csv")  # where rows go


def main(argv=None):
    """Every card and model."""
    settings, _ = parse_config(Settings, argv, config_files=False)
    rows = [row_of(card, name) for name in MODELS for card in HOST]
    write_csv(settings.csv, rows)
    for row in rows:
        print(f"{row['card_GB']:3} GB {row['model']:11} {row['longest'] or 0:>9,} {row['flags']}")


def row_of(card, name):
    """One cell of the table."""
    family, rung, length, sequences = MODELS[name]
    config = GPTConfig(**LADDERS[family][rung] | {"block_size": length})
    run = Run(config, sequences, stream_bytes=2, device_type="cuda", compiled=True)
    wish, budget = Wish(run), Budget(card * 10**9, HOST[card] * 10**9)
    row = {"card_GB": card, "host_GB": HOST[card], "model": name}
    row |= {"length": length, "sequences": sequences}
    for column, found in (("", fastest(wish, budget, 10)), ("longest", longest(wish, budget, 10))):
        plan = next((p for p in found if as_good(p.run, wish.asked)), None)
        names = [f"{column}_{n}".lstrip("_") for n in ("variant", "flags", "peak", "moment")]
        values = (plan.run.variant, plan.flags, plan.peak, plan.moment) if plan else ("",) * 4
        row |= dict(zip(names, values))
        if column:
            row["longest"] = plan.run.length if plan else ""
    return row | provenance("cpu")


def as_good(run, asked) -> bool:
    """Is its optimizer's measured loss not above that of the asked one?"""
    return run.variant == asked.variant or mean_loss_difference(run, asked) <= 0


if __name__ == "__main__":
    exit_cleanly(main)
