"""The picture of several runs: validation loss against iterations and against seconds."""

import math
import textwrap

from leangpt.runs.run import Run, differences, groups, same_data
from leangpt.system.errors import UserError

try:
    from matplotlib import ticker
    from matplotlib.figure import Figure
except ImportError:  # it does not come with leangpt alone
    Figure = None

# Okabe and Ito's palette, distinct without colour vision; then the same with other lines
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#B8A800")
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P")
MARKED = 40  # evaluations up to which each is marked on its curve
FAR_APART = 20  # runs whose lengths differ by more are drawn over a logarithmic axis
LEGEND_WIDTH = 110  # characters
SHORT = 50  # characters of settings that differ, up to which the legend has them too


def curves_figure(runs: list[Run]):
    """A matplotlib Figure, which needs no display: `figure.savefig(file)`.

    Losses are on a logarithmic axis. A loss before the first step is above the frame, towards
    which its curve leaves, so that the differences at the end can be seen. The legend names every
    run, with what tells it from the others, and says of one without a curve why it has none.
    """
    if Figure is None:
        raise UserError("a picture needs matplotlib: pip install matplotlib")
    labels = list(map(_label, runs))
    if len(groups(runs, same_data)) > 1:
        labels = [f"{label}; on {run.data_name}" for label, run in zip(labels, runs)]
    different = differences(runs)
    if max(map(len, different)) <= SHORT:
        labels = [f"{label}; {text}" if text else label for label, text in zip(labels, different)]
    labels = ["\n".join(textwrap.wrap(label, LEGEND_WIDTH)) for label in labels]
    legend_height = 0.2 * sum(label.count("\n") + 1 for label in labels) + 0.2
    figure = Figure(figsize=(11, 4.6 + legend_height), layout="constrained")
    over_iterations, over_seconds = figure.subplots(1, 2, sharey=True)
    handles = []
    for place, run in enumerate(runs):
        at, seconds, losses = [list(column) for column in zip(*run.evaluations)] or [[], [], []]
        if not losses and run.best:  # a checkpoint alone: one point, its time unknown
            losses, at, seconds = [[number] for number in (*run.best, math.nan)]
        few = len(losses) <= MARKED
        look = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": LINES[place // len(COLOURS) % len(LINES)],
            "marker": MARKERS[place % len(MARKERS)] if few else None,
            "markersize": 4 if len(losses) > 1 else 8,
            "linewidth": 1.6,
        }
        handles += over_iterations.plot(at, losses, **look)
        over_seconds.plot(seconds, losses, **look)
    _set_losses(over_iterations, runs)
    drawn = [run.evaluations[-1] for run in runs if run.evaluations]
    _set_lengths(over_iterations, [at for at, _, _ in drawn])
    _set_lengths(over_seconds, [seconds for _, seconds, _ in drawn])
    over_iterations.set(xlabel="iterations", ylabel="validation loss, nats per token")
    over_seconds.set(xlabel="seconds of training")
    legend = figure.legend(handles, labels, loc="outside lower left", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder may have dollars in its name
    return figure


def _label(run):
    """A run's line of the legend."""
    # a name is any bytes to a file system
    name = run.name.encode("utf-8", "backslashreplace").decode()
    # matplotlib before 3.10 leaves labels out that begin with _
    name = f"./{name}" if name.startswith("_") else name
    if run.evaluations:
        return f"{name}: {run.final:.4f} at iteration {run.evaluations[-1][0]:,}"
    if run.best:
        loss, at = run.best
        return f"{name}: {loss:.4f}, the best, at iteration {at:,} or before; it recorded no curve"
    return f"{name}: no evaluation yet"


def _set_losses(axis, runs):
    """The loss axis: logarithmic, plain numbers, framed by the losses after the first step."""
    losses = [loss for run in runs for at, _, loss in run.evaluations if at > 0]
    losses += [run.best[0] for run in runs if run.best and not run.evaluations]
    losses = [loss for loss in losses if 0 < loss < math.inf]
    axis.set_yscale("log")
    if losses:
        room = max(max(losses) / min(losses), 1.02) ** 0.05
        axis.set_ylim(min(losses) / room, max(losses) * room)
    low, high = axis.get_ylim()
    if high / low > 3:
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    else:  # so short a piece of the axis is nearly linear: evenly spaced numbers read best
        axis.yaxis.set_major_locator(ticker.MaxNLocator(8))
    axis.yaxis.set_major_formatter(ticker.ScalarFormatter())
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def _set_lengths(axis, lengths):
    """The axis of iterations or seconds: from 0, or logarithmic where lengths are FAR_APART."""
    lengths = [length for length in lengths if length > 0]
    if lengths and max(lengths) > FAR_APART * min(lengths):
        axis.set_xscale("log", nonpositive="mask")
    else:
        axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
