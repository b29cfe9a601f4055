"""Tables and figures on how well optimizers train: losses on fresh seeds, ablations, searches."""

import itertools

from experiments.report.memory_tables import timed_on
from experiments.report.table_tools import (
    PUBLISHED,
    figure,
    label,
    made_on,
    markdown,
    row_with,
    table,
)
from experiments.shared.paired import paired_difference

COLUMNS = [
    "validation loss",
    "against tuned AdamW",
    "p (paired)",
    "seeds",
    "state, bytes per parameter",
    "step, of fused AdamW's",
    "lr: linear / rest",
]


def lines_of(rows, speeds):
    """Summary rows, best first -> lines of the optimizer's name and COLUMNS."""
    ratios = {row["variant"]: f"{row['ratio']:.2f}×" for row in timed_on("cuda", speeds)}
    for row in sorted(rows, key=lambda row: row["val_loss"]):
        reference = row["variant"] == "torch_adamw"
        yield [
            label(row["variant"]),
            f"{row['val_loss']:.4f} ± {row['interval']:.4f}",
            "–" if reference else f"{row['to_adamw']:+.4f} ± {row['to_adamw_interval']:.4f}",
            "–" if reference else "< 1e-15" if row["p"] < 1e-15 else f"{row['p']:.1g}",
            row["seeds"],
            f"{8 * row['state_percent'] / 100:.2f}",
            ratios.get(row["variant"], ""),
            f"{row['learning_rate']:g} / {row['embedding_lr']:g}",
        ]


# options whose worth a table of its own shows
ABLATED = ("column_norm=False", "nu=", "nu1=", "rounding=", "muonsn4:", "adamsn8:", "role_rates={}")
DEFAULT_MOMENTUM = (0.95, 0.8)  # beta1 and nu1 of rows that name no other
# what the larger character model is better with
ADAMS_MOMENTUM = ("adamsn:betas=(0.9,0.99)+nu1=0.9", "adamsn:betas=(0.9,0.99)+nu1=1.0")


@table("optimizers", "optimizer_quality_summary.csv", "optimizer_speed.csv")
def optimizers(rows, speeds):
    """Each variant at the best of its own grid, on fresh seeds, at the small setup."""
    return markdown(["optimizer", *COLUMNS], lines_of(compared(rows, "seed", 2000), speeds))


@table("optimizers_all", "optimizer_quality_summary.csv", "optimizer_speed.csv")
def optimizers_all(rows, speeds):
    """The same with options that other rows are without."""
    rows = [row for row in rows if row["setup"] == "seed"]
    return markdown(["optimizer", *COLUMNS], lines_of(rows, speeds))


def ablated(row):
    return row["variant"] != PUBLISHED and any(option in row["variant"] for option in ABLATED)


SETUPS = {  # (setup, iterations) -> what the tables call it
    ("bpe51m", 1000): "GPT-2 tokens, 51M parameters",
    ("char384", 1000): "characters, 10.7M parameters, 16 passes",
    ("char384", 2000): "characters, 10.7M parameters, 32 passes",
}


def compared(rows, setup, iterations):
    """Summary rows of one setup: every optimizer compared, without the rows that ablate options.

    Of an optimizer whose defaults have not run there, the best that there is.
    """
    rows = [row for row in rows if (row["setup"], row["iterations"]) == (setup, iterations)]
    known = {row["variant"] for row in rows}
    return [
        row
        for row in rows
        if not ablated(row)
        or (setup, row["variant"]) in {("char384", variant) for variant in ADAMS_MOMENTUM}
        or "role_rates={}" in row["variant"]
        and row["variant"].partition(":")[0] not in known
    ]


@table("optimizers_larger", "optimizer_quality_summary.csv", "optimizer_speed.csv")
def optimizers_larger(rows, speeds):
    """The same for larger models, a table each."""
    return "\n\n".join(
        f"{name[0].upper()}{name[1:]}:\n\n"
        + markdown(["optimizer", *COLUMNS], lines_of(compared(rows, *key), speeds))
        for key, name in SETUPS.items()
    )


@table("adamsn_momentum", "optimizer_quality_summary.csv")
def adamsn_momentum(rows):
    """adamsn's momentum at all three sizes: differences to AdamW on fresh seeds."""
    setups = {
        ("seed", 2000): "characters, 0.8M",
        ("char384", 1000): "characters, 10.7M",
        ("bpe51m", 1000): "GPT-2 tokens, 51M",
    }
    found = {((row["setup"], row["iterations"]), row["variant"]): row for row in rows}
    lines = []
    momenta = DEFAULT_MOMENTUM, (0.9, 0.8), (0.9, 0.9), (0.9, 1.0)
    for optimizer, (beta1, nu1) in itertools.product(("adamsn", "adamsn8"), momenta):
        cells = []
        for setup in setups:
            name = optimizer  # beta2 is the setup's
            if (beta1, nu1) != DEFAULT_MOMENTUM:
                beta2 = 0.95 if setup[0] == "bpe51m" else 0.99
                name += f":betas=({beta1},{beta2})+nu1={nu1}"
            row = found.get((setup, name))
            cells.append(f"{row['to_adamw']:+.4f} ± {row['to_adamw_interval']:.4f}" if row else "")
        if any(cells):
            lines.append([f"`{optimizer}`", beta1, nu1, *cells])
    return markdown(["optimizer", "momentum", "its share of the update", *setups.values()], lines)


@table("optimizers_grids", "optimizer_quality.csv")
def optimizers_grids(rows):
    """Optimizers of larger models that have a grid of one seed and no fresh ones, beside the best
    of AdamW's grid on that seed."""
    lines = []
    for key, name in SETUPS.items():
        found = {}
        for row in rows:
            if (row["setup"], row["iterations"]) == key:
                found.setdefault(row["variant"], []).append(row)
        adamw = best_of_grid(found["torch_adamw"])["best_val_loss"]
        for mine in found.values():
            if all(row["seed"] == 1 for row in mine):
                best = best_of_grid(mine)
                lines.append(
                    [
                        name,
                        label(best["variant"]),
                        f"{best['best_val_loss']:.4f}",
                        f"{best['best_val_loss'] - adamw:+.4f}",
                        len(mine),
                        f"{best['learning_rate']:g} / {best['embedding_lr']:g}",
                    ]
                )
    return markdown(
        [
            "setup",
            "optimizer",
            "validation loss, seed 1",
            "against AdamW's",
            "settings run",
            "lr: linear / rest",
        ],
        lines,
    )


def best_of_grid(rows):
    """Of one variant's rows, the one of seed 1 with the lowest loss."""
    return min((row for row in rows if row["seed"] == 1), key=lambda row: row["best_val_loss"])


BEFORE = "+betas=(0.9,0.99)+nu1=1.0+role_rates={}"  # what adamsn's rows there have in common


@table("adamsn_ablation", "optimizer_ablation.csv")
def adamsn_ablation(rows):
    """Subsets of adamsn by role, each at the best of its small grid: means of the grid's seeds."""
    rows = [
        row
        for row in rows
        if row["variant"].startswith("adamsn") and row["variant"].endswith(BEFORE.removeprefix("+"))
    ]
    found = {}
    for row in rows:
        rates = f"{row['learning_rate']:g} / {row['embedding_lr']:g}"
        name = row["variant"].removesuffix(BEFORE).removesuffix(BEFORE.removeprefix("+"))
        losses = found.setdefault(name.rstrip(":"), {}).setdefault(rates, [])
        losses.append(row["best_val_loss"])
    lines = []
    for name, grid in found.items():
        rates = min(grid, key=lambda rates: sum(grid[rates]) / len(grid[rates]))
        lines.append(
            [label(name), f"{sum(grid[rates]) / len(grid[rates]):.4f}", rates, len(grid[rates])]
        )
    return markdown(
        ["subsets", "validation loss", "lr: linear / rest", "seeds"],
        sorted(lines, key=lambda line: line[1]),
    ) + made_on(rows)


@table("adaptive_search", "adaptive_search.csv")
def adaptive_search(rows):
    """Each family as it is and its eight best recipes, against AdamW on the same seeds."""
    found = {}
    for row in rows:
        found.setdefault(row["recipe"], {})[row["seed"]] = row["val_loss"]
    lines = []
    for family in dict.fromkeys(name.partition(":")[0] for name in found):
        compared = []
        for name, losses in found.items():
            if name.partition(":")[0] == family:
                seeds = sorted(losses)
                difference, half, _ = paired_difference(
                    [losses[seed] for seed in seeds], [found["adamw"][seed] for seed in seeds]
                )
                compared.append((difference, half, name, len(seeds)))
        best = sorted(compared)[:8]
        best += [line for line in compared if line[2] == family and line not in best]
        lines += [
            [f"`{name}`", f"{difference:+.4f}" + (f" ± {half:.4f}" if half else ""), seeds]
            for difference, half, name, seeds in best
        ]
    return markdown(["recipe", "against AdamW", "seeds"], lines) + made_on(rows)


@table("low_byte", "optimizer_quality.csv")
def low_byte(rows):
    """Weights in bfloat16, and updates inside backward, against float32; paired by seed, at the
    same rates."""
    names = {
        "seed": "float32, clipped by the norm of all gradients",
        "seed_bf16": "bfloat16, rounded stochastically; the same clip",
        "seed_fused": "bfloat16, clipped by the norm of the step before, as inside backward",
        "seed_unclipped": "bfloat16, each tensor's update clipped instead (`grad_clip=0`)",
    }
    found = {}
    for row in rows:
        base = row["variant"].removesuffix(":update_clip=1.0")
        if row["setup"] in names and row["seed"] > 1000 and row["iterations"] == 2000:
            run = row["learning_rate"], row["embedding_lr"], row["seed"]
            found.setdefault((base, row["setup"]), {})[run] = row["best_val_loss"]
    lines = []
    for optimizer in ("muonsn8", "adamsn8"):
        whole = found[optimizer, "seed"]
        for setup, name in names.items():
            runs = sorted(found.get((optimizer, setup), {}).keys() & whole.keys())
            if not runs:
                continue
            mine = [found[optimizer, setup][run] for run in runs]
            difference, half, _ = paired_difference(mine, [whole[run] for run in runs])
            lines.append(
                [
                    f"`{optimizer}`",
                    name,
                    f"{sum(mine) / len(mine):.4f}",
                    "–" if setup == "seed" else f"{difference:+.4f} ± {half:.4f}",
                    len(runs),
                ]
            )
    return markdown(["optimizer", "weights", "validation loss", "against float32", "seeds"], lines)


def of_variant(rows, variant):
    """The row of one optimizer at the seed setup."""
    return next(row for row in rows if (row["setup"], row["variant"]) == ("seed", variant))


@figure("muonsn8_gain_51m", "optimizer_quality_summary.csv")
def muonsn8_gain_51m(rows):
    """Nats below tuned AdamW, GPT-2 tokens, 51M parameters."""
    row = row_with(rows, setup="bpe51m", iterations=1000, variant="muonsn8")
    return f"{-row['to_adamw']:.2f} nats"


@figure("muonsn8_state_51m", "optimizer_quality_summary.csv")
def muonsn8_state_51m(rows):
    """Of AdamW's bytes, in the same model."""
    row = row_with(rows, setup="bpe51m", iterations=1000, variant="muonsn8")
    return f"{row['state_percent']:.0f}%"


@figure("muonsn8_gain", "optimizer_quality_summary.csv")
def muonsn8_gain(rows):
    """Nats below tuned AdamW."""
    return f"{-of_variant(rows, 'muonsn8')['to_adamw']:.2f} nats"


@figure("muonsn8_state", "optimizer_quality_summary.csv")
def muonsn8_state(rows):
    """Of AdamW's bytes."""
    return f"{of_variant(rows, 'muonsn8')['state_percent']:.0f}%"


@figure("adamsn_gain", "optimizer_quality_summary.csv")
def adamsn_gain(rows):
    """Nats below tuned AdamW."""
    return f"{-of_variant(rows, 'adamsn')['to_adamw']:.3f} nats"


@figure("adamsn8_gain", "optimizer_quality_summary.csv")
def adamsn8_gain(rows):
    """Nats below tuned AdamW."""
    return f"{-of_variant(rows, 'adamsn8')['to_adamw']:.3f} nats"


@figure("adamsn8_state", "optimizer_quality_summary.csv")
def adamsn8_state(rows):
    """Of AdamW's bytes."""
    return f"{of_variant(rows, 'adamsn8')['state_percent']:.0f}%"


@figure("adafactor_state", "optimizer_quality_summary.csv")
def adafactor_state(rows):
    """Of AdamW's bytes."""
    return f"{of_variant(rows, 'adafactor')['state_percent']:.1f}%"


@figure("adafactor_momentum_gain", "optimizer_quality_summary.csv")
def adafactor_momentum_gain(rows):
    """Nats below tuned AdamW, with an 8-bit momentum for the embeddings."""
    row = of_variant(rows, "adafactor:embedding_momentum=0.9+momentum_bits=8")
    return f"{-row['to_adamw']:.3f} nats"
