"""Predicted against measured peaks, one dot a run."""

import matplotlib.pyplot as plt

from experiments.report.plan_accuracy_tables import measured
from leangpt.memory.search import RESERVE

LOOKS = {  # how blocks run -> colour (Okabe and Ito's palette), mark
    "plain": ("#0072B2", "o"),
    "tiles": ("#E69F00", "s"),
    "checkpoint_layers": ("#009E73", "^"),
    "offload": ("#CC79A7", "D"),
}
FALSE_FITS = {"cpu": "below: false fits", "cuda": "below, from 5,000 MB on: false fits"}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def accuracy_figure(rows):
    """Above, peaks against each other; below, how far off, and where a plan would be wrong."""
    devices = [device for device in DEVICES if measured(rows, device)]
    figure, axes = plt.subplots(
        2, len(devices), figsize=(5 + 4 * len(devices), 7), layout="constrained", squeeze=False,
        sharex="col", height_ratios=(3, 2),
    )  # fmt: skip
    for column, device in enumerate(devices):
        above, below = axes[:, column]
        found = measured(rows, device)
        for name, (colour, mark) in LOOKS.items():
            alike = [row for row in found if row["family"].partition(",")[0] == name]
            if not alike:
                continue
            x = [row["measured"] / 1e6 for row in alike]
            style = dict(s=22, c=colour, marker=mark, alpha=0.75, linewidths=0)
            above.scatter(x, [row["predicted"] / 1e6 for row in alike], label=name, **style)
            below.scatter(x, [100 * row["error"] for row in alike], **style)
        ends = [f(row["measured"] for row in found) / 1e6 for f in (min, max)]
        above.plot(ends, ends, color="#999999", linewidth=0.8, zorder=0)
        above.set(xscale="log", yscale="log", ylabel="predicted peak, MB")
        above.set_title(f"{len(found)} runs on a {DEVICES[device]}", loc="left")
        above.legend(frameon=False)
        floor = -100 * RESERVE[device]
        below.axhline(0, color="#999999", linewidth=0.8, zorder=0)
        below.axhline(floor, color="#D55E00", linewidth=0.8, linestyle="--", zorder=0)
        below.annotate(
            FALSE_FITS[device], (1, floor), color="#D55E00",
            xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=9,
            xytext=(0, -3), textcoords="offset points",
        )  # fmt: skip
        low, high = below.get_ylim()
        below.set(ylim=(min(low, 2 * floor), high), ylabel="error, %")
        below.set_xlabel("measured peak of a training step, MB")
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
    return figure
