"""Figures of attention's time and memory, for williams.ipynb and the pages.

Every function takes the rows of one CSV (experiments.shared.common.read_csv) and returns a
matplotlib figure. A policy has the same colour and marker everywhere, distinct without colour
vision.
"""

import math

import matplotlib.pyplot as plt

try:
    from IPython.display import display
except ImportError:  # no notebook, no picker
    display = None
try:
    import ipywidgets
except ImportError:
    ipywidgets = None

STYLE = {  # policy -> colour (Okabe and Ito's palette), marker
    "plain": ("#555555", "s"),
    "cache": ("#0072B2", "o"),
    "grouped": ("#009E73", "^"),
    "recompute": ("#D55E00", "D"),
    "checkpoint": ("#E69F00", "P"),
    "int4": ("#CC79A7", "v"),
}
NAMES = {  # policy -> what a legend adds to it
    "plain": "plain: everything kept",
    "cache": "cache: tiles, K and V of all rows kept",
    "grouped": "grouped: the same with fewer key/value heads",
    "recompute": "recompute: tiles, K and V computed again",
    "checkpoint": "recompute with checkpoint_layers",
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
        (time_axis, "seconds per pass"),
        (ratio_axis, "time, of plain's"),
        (peak_axis, "peak MB beyond weights and input"),
    ):
        _log_lengths(axis, lengths)
        axis.set(title=title, yscale="linear" if axis is ratio_axis else "log")
        if axis is not ratio_axis:
            plain_numbers(axis.yaxis)
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
    ratio_axis.set_ylim(0, 1.15 * ratio_axis.get_ylim()[1])
    if peak_axis.lines:
        figure.legend(loc="outside lower center", ncols=len(peak_axis.lines), frameon=False)
    if rows:
        figure.suptitle(f"One block, {mode}: {_setup(rows[0])}")
    return figure


def training_peak_figure(rows):
    """Peak of forward and backward against length, one line per policy.

    Lines that coincide lie over one another: the ones drawn first are wider and show as rims.
    """
    figure, axis = plt.subplots(figsize=(9, 4.8), layout="constrained")
    rows = [row for row in rows if row["mode"] == "forward+backward"]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    for place, policy in enumerate(policies):
        points = sorted((row["seq"], row["peak_MB"]) for row in rows if row["policy"] == policy)
        colour, marker = STYLE[policy]
        look = {"color": colour, "marker": marker}
        look |= {"linewidth": 5 - 0.9 * place, "markersize": 12 - 1.7 * place}
        axis.plot(*zip(*points), label=NAMES.get(policy, policy), **look)
    _log_lengths(axis, sorted({row["seq"] for row in rows}))
    axis.set(yscale="log", ylabel="peak MB beyond weights and input")
    plain_numbers(axis.yaxis)
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axis.legend(frameon=False, title="lines that coincide lie over one another")
    figure.suptitle(f"Training one block, forward and backward: {_setup(rows[0])}")
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
        label="recompute, rows per tile",
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
        ylabel="seconds per pass",
    )
    plain_numbers(axis.xaxis)
    plain_numbers(axis.yaxis, "1234568")  # less than a decade of seconds
    axis.margins(0.12)
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axis.legend(frameon=False)
    figure.suptitle(f"The trade at T = {rows[0]['seq']:,}: {_setup(rows[0])}")
    return figure


def policy_picker(rows):
    """Controls of mode and policies, and scaling_figure below, drawn anew when they change.

    The picture is an ordinary output of a notebook's cell, so one that was stored shows it where
    nothing runs. Where ipywidgets is not installed, it is all there is. Returns a function of
    (mode, policies) that draws it anew, and the controls, None without ipywidgets.
    """
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    controls = None
    if ipywidgets is not None:
        mode = ipywidgets.Dropdown(options=modes)
        chosen = ipywidgets.SelectMultiple(
            options=policies, value=policies, description="policies", rows=len(policies)
        )
        controls = ipywidgets.HBox([mode, chosen])
        display(controls)
    shown = display(_closed(scaling_figure(rows, modes[0], policies)), display_id=True)

    def draw(mode, policies):
        shown.update(_closed(scaling_figure(rows, mode, policies)))

    if controls is not None:
        for control in (mode, chosen):
            control.observe(lambda _: draw(mode.value, chosen.value), "value")
    return draw, controls


def _closed(figure):
    """The same figure, which the notebook will not show by itself a second time."""
    plt.close(figure)
    return figure


def _setup(row):
    return f"C={row['d_model']}, H={row['heads']}, {row['dtype']}"


def plain_numbers(axis, digits="125"):
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
