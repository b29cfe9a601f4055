"""Figures of the measurements, for williams.ipynb and the README.

Every function takes the rows of one CSV (experiments.common.read_csv) and returns a matplotlib
figure. A policy has the same colour and marker everywhere, distinct without colour vision.
"""

import math

import matplotlib.pyplot as plt

STYLE = {  # policy -> colour (Okabe and Ito's palette), marker
    "plain": ("#555555", "s"),
    "cache": ("#0072B2", "o"),
    "grouped": ("#009E73", "^"),
    "recompute": ("#D55E00", "D"),
    "checkpoint": ("#E69F00", "P"),
    "int4": ("#CC79A7", "v"),
}


def scaling_figure(rows, mode, policies=None):
    """Time, time over plain's, and peak against length; bars are interquartile ranges.

    Where lines coincide, as peaks do, the ones drawn first show as rims around the later ones.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    time_axis, ratio_axis, peak_axis = axes
    rows = [row for row in rows if row["mode"] == mode]
    known = dict.fromkeys(row["policy"] for row in rows)
    for place, policy in enumerate(known if policies is None else policies):
        points = sorted(
            (row["seq"], row["time_s"], row["iqr_s"], row["peak_MB"], row["time_vs_plain"])
            for row in rows
            if row["policy"] == policy
        )
        if not points:
            continue
        T, seconds, iqr, peak, ratio = zip(*points)
        colour, marker = STYLE[policy]
        look = {
            "color": colour,
            "marker": marker,
            "markersize": 10 - 1.5 * place,
            "linewidth": 4 - 0.7 * place,
        }
        time_axis.errorbar(T, seconds, yerr=[each / 2 for each in iqr], capsize=2, **look)
        ratio_axis.plot(T, [math.nan if each is None else each for each in ratio], **look)
        peak_axis.plot(T, peak, label=policy, **look)
    lengths = sorted({row["seq"] for row in rows})
    for axis, title in (
        (time_axis, "seconds a pass"),
        (ratio_axis, "time, of plain's"),
        (peak_axis, "peak MB beyond weights and input"),
    ):
        _log_lengths(axis, lengths)
        axis.set(title=title, yscale="linear" if axis is ratio_axis else "log")
        if axis is not ratio_axis:
            _plain_numbers(axis.yaxis)
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
    ratio_axis.margins(y=0.1)
    ratio_axis.set_ylim(bottom=0)
    if peak_axis.lines:
        figure.legend(loc="outside lower center", ncols=len(peak_axis.lines), frameon=False)
    if rows:
        figure.suptitle(f"One block, {mode}: {_setup(rows[0])}")
    return figure


def chunk_figure(rows):
    """The trade itself: a point a tile size, memory across, time upwards; sqrt(T) is marked."""
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    tiles = [row for row in rows if row["policy"] == "recompute"]
    colour, marker = STYLE["recompute"]
    axis.plot(
        [row["peak_MB"] for row in tiles],
        [row["time_s"] for row in tiles],
        color=colour,
        marker=marker,
        label="recompute, rows a tile",
    )
    for row in tiles:
        root = " = √T" if row["q_chunk"] ** 2 == row["seq"] else ""
        axis.annotate(
            f"{row['q_chunk']:,}{root}",
            (row["peak_MB"], row["time_s"]),
            fontsize=9,
            xytext=(5, 5),
            textcoords="offset points",
        )
    for row in rows:
        if row["policy"] == "plain":
            colour, marker = STYLE["plain"]
            axis.plot(
                row["peak_MB"],
                row["time_s"],
                color=colour,
                marker=marker,
                linestyle="none",
                label="plain, no tiles",
            )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="peak MB beyond weights and input",
        ylabel="seconds a pass",
    )
    _plain_numbers(axis.xaxis)
    _plain_numbers(axis.yaxis, "1234568")  # less than a decade of seconds
    axis.margins(0.12)
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axis.legend(frameon=False)
    figure.suptitle(f"The trade at T = {rows[0]['seq']:,}: {_setup(rows[0])}")
    return figure


OURS = {"muonsn": "#D55E00", "adamsn": "#0072B2", "adafactor": "#009E73"}  # others: grey
WORST = {"seed": 1.87}  # losses beyond are left out
ASIDE = {  # where a name stands that would run into another: points from its mark; default (9, 0)
    "seed": {
        "muonsn4": (-9, 0),
        "bitsandbytes_adamw8bit": (-9, 4),
        "torchao_adamw8bit": (-9, -4),
        "torchao_adamw4bit": (9, -9),
        "apollo_adamw": (-9, 0),
        "torch_adamw": (9, 7),
    },
    "char384": {
        "muonsn": (9, -5),
        "torch_muon": (9, 6),
        "muonsn4": (-9, 0),
        "adam_mini": (9, 6),
        "adamsn8": (-9, 6),
        "adamsn": (-9, 10),
        "galore_adamw": (-9, 3),
        "pytorch_optimizer_adamwsn": (30, 14),
        "torchao_adamw4bit": (-9, 0),
        "torch_adamw": (9, 0),
        "bitsandbytes_adamw8bit": (-9, -8),
        "torchao_adamw8bit": (9, -5),
    },
    "bpe51m": {
        "torchao_adamw8bit": (-9, -5),
        "bitsandbytes_adamw8bit": (-9, 6),
        "torch_adamw": (9, -6),
        "torchao_adamw4bit": (-9, 0),
        "muonsn4": (-9, 0),
        "adam_mini": (-9, 0),
        "galore_adamw": (-9, 4),
        "pytorch_optimizer_adamwsn": (30, 3),
        "torch_nadam": (9, 6),
        "apollo_mini": (-9, 0),
    },
}


def optimizer_figure(rows):
    """Validation loss against bytes of state, of Adam's, at the seed setup; bars are 95% intervals.

    rows: of optimizer_quality_summary.csv. Variants without options, and the one of `adafactor`
    that has two.
    """
    figure, axis = plt.subplots(figsize=(10, 6.4), layout="constrained")
    _loss_against_state(axis, rows, "seed", 2000)
    figure.suptitle("0.8M-parameter character model, 2,000 iterations: lower left is better")
    return figure


def larger_optimizer_figure(rows):
    """The same at the two larger setups, one above the other."""
    figure, axes = plt.subplots(2, 1, figsize=(10, 14), layout="constrained")
    for axis, setup, title in zip(
        axes,
        ("char384", "bpe51m"),
        ("10.7M parameters, characters, 16 passes", "51M parameters, 8.2M GPT-2 tokens"),
    ):
        _loss_against_state(axis, rows, setup, 1000)
        axis.set_title(title)
    return figure


def _loss_against_state(axis, rows, setup, iterations):
    """One panel: a mark an optimizer, ours in colour, AdamW's loss as a dashed line."""
    rows = [
        row
        for row in rows
        if (row["setup"], row["iterations"]) == (setup, iterations)
        and row["val_loss"] < WORST.get(setup, math.inf)
    ]
    for row in rows:
        name, _, options = row["variant"].partition(":")
        if options and options != "embedding_momentum=0.9+momentum_bits=8":
            continue
        colour = OURS.get(name.rstrip("0123456789"), "#777777")
        axis.errorbar(
            row["state_percent"],
            row["val_loss"],
            yerr=row["interval"],
            color=colour,
            marker="o",
            markersize=7 if colour != "#777777" else 5,
            capsize=2,
        )
        aside = ASIDE[setup].get(name, (9, 0))
        label = "+ 8-bit momentum\nof embeddings" if options else name
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        axis.annotate(
            label,
            (row["state_percent"], row["val_loss"]),
            color=colour,
            va="center",
            ha="right" if aside[0] < 0 else "left",
            xytext=aside,
            textcoords="offset points",
            arrowprops=line if abs(aside[0]) > 9 else None,
            **({"size": 9} if colour == "#777777" else {"weight": "bold"}),
        )
    adamw = next(row for row in rows if row["variant"] == "torch_adamw")
    axis.axhline(adamw["val_loss"], color="#777777", linewidth=0.8, linestyle="--")
    least = min(row["state_percent"] for row in rows)
    axis.set(
        xscale="log",
        xlim=(0.68 * least, 900),
        xlabel="optimizer state, % of Adam's bytes",
        ylabel="validation loss, each at its best rates",
    )
    axis.set_xticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick > least])
    _plain_numbers(axis.xaxis)
    axis.minorticks_off()
    axis.grid(alpha=0.3, linewidth=0.5)


def policy_picker(rows):
    """A live picker of mode and policies around scaling_figure; what to display in a notebook.

    Where ipywidgets is not installed, the figure with every policy.
    """
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    try:
        import ipywidgets
    except ImportError:
        return scaling_figure(rows, modes[0])
    chosen = ipywidgets.SelectMultiple(
        options=policies, value=policies, description="policies", rows=len(policies)
    )

    def draw(mode, chosen):
        scaling_figure(rows, mode, chosen)
        plt.show()

    return ipywidgets.interactive(draw, mode=ipywidgets.Dropdown(options=modes), chosen=chosen)


def _setup(row):
    return f"C={row['d_model']}, H={row['heads']}, {row['dtype']}"


def _plain_numbers(axis, digits="125"):
    """20, not 2 x 10^1; and of a decade only the numbers that begin with one of `digits`."""

    def label(value, _):
        return f"{value:g}" if f"{value:e}"[0] in digits else ""

    axis.set_major_formatter(label)
    axis.set_minor_formatter(label)


def _log_lengths(axis, lengths):
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{T // 1024}k" if T >= 1024 else str(T) for T in lengths])
    axis.minorticks_off()
    axis.set_xlabel("sequence length T")
