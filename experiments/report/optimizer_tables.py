"""The README's tables and figures on optimizers; readme_tables.py writes them."""

import itertools
from statistics import median

from experiments.report.table_tools import figure, gigabytes, made_on, markdown, milliseconds, table
from experiments.shared.paired import paired_difference

COLUMNS = [
    "validation loss",
    "against tuned AdamW",
    "p (paired)",
    "seeds",
    "state, bytes a parameter (of Adam's)",
    "a step, of fused AdamW's",
    "lr: linear / rest",
]


def lines_of(rows, speeds):
    """Summary rows, best first -> lines of the optimizer's name and COLUMNS."""
    ratios = {row["variant"]: f"{row['ratio']:.2f}×" for row in timed_on("cuda", speeds)}
    for row in sorted(rows, key=lambda row: row["val_loss"]):
        reference = row["variant"] == "torch_adamw"
        yield [
            label(row),
            f"{row['val_loss']:.4f} ± {row['interval']:.4f}",
            "–" if reference else f"{row['to_adamw']:+.4f} ± {row['to_adamw_interval']:.4f}",
            "–" if reference else "< 1e-15" if row["p"] < 1e-15 else f"{row['p']:.1g}",
            row["seeds"],
            f"{8 * row['state_percent'] / 100:.2f} ({row['state_percent']:.1f}%)",
            ratios.get(row["variant"], ""),
            f"{row['learning_rate']:g} / {row['embedding_lr']:g}",
        ]


# options whose worth docs/RESULTS.md shows, not the README
ABLATED = ("column_norm=False", "nu=", "nu1=", "rounding=", "muonsn4:", "adamsn8:", "role_rates={}")
DEFAULT_MOMENTUM = (0.95, 0.8)  # beta1 and nu1 of rows that name no other
# what the larger character model is better with
ADAMS_MOMENTUM = ("adamsn:betas=(0.9,0.99)+nu1=0.9", "adamsn:betas=(0.9,0.99)+nu1=1.0")
PUBLISHED = "adamsn:norm=sum+partition=larger+betas=(0.9,0.99)+nu1=1.0+role_rates={}"


@table("optimizers", "optimizer_quality_summary.csv", "optimizer_speed.csv")
def optimizers(rows, speeds):
    """Each variant at the best of its own grid, on fresh seeds."""
    return optimizers_all([row for row in rows if not ablated(row)], speeds)


@table("optimizers_all", "optimizer_quality_summary.csv", "optimizer_speed.csv")
def optimizers_all(rows, speeds):
    """The same with options that other rows are without."""
    rows = [row for row in rows if row["setup"] == "seed"]
    return markdown(["optimizer", *COLUMNS], lines_of(rows, speeds))


def timed_on(device, speeds):
    """Rows of optimizer_speed.csv: GPT-2 124M on "cpu" or "cuda"."""
    return [row for row in speeds if (row["shape"], row["device"]) == ("124m", device)]


def label(row):
    """What a table calls an optimizer."""
    return "AdamSN as published" if row["variant"] == PUBLISHED else f"`{row['variant']}`"


def ablated(row):
    return row["variant"] != PUBLISHED and any(option in row["variant"] for option in ABLATED)


SETUPS = {  # (setup, iterations) -> what the table calls it
    ("char384", 1000): "characters, 16 passes",
    ("char384", 2000): "characters, 32 passes",
    ("bpe51m", 1000): "GPT-2 tokens, 51M",
}


@table("optimizers_larger", "optimizer_quality_summary.csv", "optimizer_speed.csv")
def optimizers_larger(rows, speeds):
    """The same for larger models."""
    lines = []
    for key, name in SETUPS.items():
        mine = [row for row in rows if (row["setup"], row["iterations"]) == key]
        tuned = {row["variant"] for row in mine}
        # the best that there is of an optimizer whose defaults have not run here
        mine = [
            row
            for row in mine
            if not ablated(row)
            or row["variant"] in ADAMS_MOMENTUM
            or "role_rates={}" in row["variant"]
            and row["variant"].partition(":")[0] not in tuned
        ]
        lines += [[name, *line] for line in lines_of(mine, speeds)]
    return markdown(["setup", "optimizer", *COLUMNS], lines)


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
                        label(best),
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
            [f"`{name}`", f"{sum(grid[rates]) / len(grid[rates]):.4f}", rates, len(grid[rates])]
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


@table("memory_variants", "optimizer_memory.csv")
def memory_variants(rows):
    """GPT-2 XL, one sequence of 1,024 tokens: bytes a parameter, and the whole peak."""
    rows = [row for row in rows if row["part"] == "variants"]
    return markdown(
        [
            "optimizer",
            "weights",
            "gradients",
            "bytes a parameter: state",
            "weights + gradients + state",
            "peak of a training step",
        ],
        [
            [
                f"`{row['variant']}`",
                row["weights"],
                "freed inside backward" if row["fused_backward"] == "True" else row["weights"],
                f"{row['state_bytes'] / row['parameters']:.3f}",
                f"{row['bytes_per_parameter']:.2f}",
                gigabytes(row["peak_bytes"] / 1e9),
            ]
            for row in rows
        ],
    ) + made_on(rows)


@table("memory_largest", "optimizer_memory.csv")
def memory_largest(rows):
    """Models that trained on one GPU, three whole steps each."""
    rows = [row for row in rows if row["part"] == "largest" and row["fits"] == "True"]
    return markdown(
        ["parameters", "bytes a parameter", "peak", "a step", "loss on one batch, 3 steps"],
        [
            [
                f"{row['parameters'] / 1e9:.1f}B",
                f"{row['bytes_per_parameter']:.2f}",
                gigabytes(row["peak_bytes"] / 1e9),
                f"{row['step_seconds']:.1f} s",
                f"{row['loss_first']:.2f} → {row['loss_last']:.2f}",
            ]
            for row in rows
        ],
    ) + made_on(rows)


@table("optimizer_speed", "optimizer_speed.csv")
def optimizer_speed(rows):
    """One step on 124M parameters against torch's fused AdamW, and the bytes of state."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = timed_on(device, rows)
        parts.append(
            markdown(
                ["optimizer", "a step", "of fused AdamW's", "state, bytes a parameter"],
                [
                    [
                        f"`{row['variant']}`",
                        milliseconds(row["step_ms"]),
                        f"{row['ratio']:.2f}×",
                        f"{row['state_bytes'] / row['parameters']:.2f}",
                    ]
                    for row in sorted(mine, key=lambda row: row["ratio"])
                ],
            )
            + made_on(mine)
        )
    return "\n\n".join(parts)


@table("time_to_loss", "time_to_loss.csv")
def time_to_loss(rows):
    """Seconds of training until nanoGPT's final loss."""
    return markdown(
        ["recipe", "seed", "reached", "iterations", "training time"],
        [
            [
                row["side"],
                row["seed"],
                "yes" if row["reached"] == "True" else "no",
                row["iterations"],
                f"{row['seconds']:.1f} s",
            ]
            for row in rows
        ],
    ) + made_on(rows)


def of_variant(rows, variant):
    """The row of one optimizer at the seed setup."""
    return next(row for row in rows if (row["setup"], row["variant"]) == ("seed", variant))


@figure("muonsn8_gain", "optimizer_quality_summary.csv")
def muonsn8_gain(rows):
    """Nats below tuned AdamW."""
    return f"{-of_variant(rows, 'muonsn8')['to_adamw']:.2f} nats"


@figure("muonsn8_state", "optimizer_quality_summary.csv")
def muonsn8_state(rows):
    """Of AdamW's bytes."""
    return f"{of_variant(rows, 'muonsn8')['state_percent']:.0f}%"


@figure("muonsn8_step", "optimizer_speed.csv")
def muonsn8_step(rows):
    """More than fused AdamW's, GPT-2 124M on a GPU."""
    row = next(row for row in timed_on("cuda", rows) if row["variant"] == "muonsn8")
    return f"{row['step_ms'] - row['adamw_ms']:.1f} ms"


@figure("muonsn_cpu_step", "optimizer_speed.csv")
def muonsn_cpu_step(rows):
    """Of fused AdamW's, GPT-2 124M on a CPU."""
    row = next(row for row in timed_on("cpu", rows) if row["variant"] == "muonsn")
    return f"{row['ratio']:.0f}"


@figure("short_step", "attention_gpu.csv")
def short_step(rows):
    """One training step of GPT-2 124M, 32 sequences of 1,024 tokens, with AdamW."""
    times = [row["seconds"] for row in rows if row["name"] == "short plain"]
    return f"{1e3 * median(times):.0f} ms"


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


@figure("low_byte_bytes", "optimizer_memory.csv")
def low_byte_bytes(rows):
    """Of weights and state, `muonsn8` in bfloat16 with updates inside backward."""
    row = next(
        row
        for row in rows
        if (row["part"], row["variant"], row["fused_backward"]) == ("variants", "muonsn8", "True")
    )
    return f"{row['bytes_per_parameter']:.2f} bytes"


@figure("adam_bytes", "optimizer_memory.csv")
def adam_bytes(rows):
    """Of weights, gradients and state, AdamW in float32."""
    row = next(row for row in rows if (row["part"], row["variant"]) == ("variants", "adam"))
    return f"{row['bytes_per_parameter']:.0f}"


@figure("largest_model", "optimizer_memory.csv")
def largest_model(rows):
    """Parameters of the largest that fitted."""
    fitting = [row for row in rows if row["part"] == "largest" and row["fits"] == "True"]
    return f"{max(row['parameters'] for row in fitting) / 1e9:.1f}B"
