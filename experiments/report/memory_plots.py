"""Where a training step's memory is: bars of weights, gradients, optimizer state, activations."""

import matplotlib.pyplot as plt

from experiments.report.front_tables import training, xl

PARTS = {  # part -> colour (Okabe and Ito's palette)
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer state": "#E69F00",
    "activations and all else, up to the measured peak": "#999999",
}
LONG = 65536  # tokens of the second panel


def xl_bars(rows):
    """(name, gigabytes of each part) of GPT-2 XL's steps; rows of optimizer_memory.csv."""
    low = "bfloat16 weights"
    cases = (
        ("AdamW", xl(rows, "adam")),
        ("muonsn8", xl(rows, "muonsn8")),
        (f"muonsn8, {low}", xl(rows, "muonsn8", "bfloat16")),
        (f"muonsn8, {low}, fused_backward", xl(rows, "muonsn8", "bfloat16", "True")),
        (f"adafactor, {low}, fused_backward", xl(rows, "adafactor", "bfloat16", "True")),
    )
    for name, row in cases:
        parts = [row[f"{part}_bytes"] / 1e9 for part in ("weight", "gradient", "state")]
        yield name, [*parts, row["peak_bytes"] / 1e9 - sum(parts)]


def long_bars(rows):
    """The same of GPT-2 124M over 65,536 tokens with AdamW; rows of attention_gpu.csv.

    Weights, gradients and both moments are 4 bytes per parameter, the model's 12 layers, tied
    embedding and norms, with a table of positions where the run had one.
    """
    layers, width, vocabulary = 12, 768, 50304
    parameters = 12 * layers * width**2 + (vocabulary + 2 * layers + 1) * width
    cases = (  # name of the row, of the bar, positions learned?
        ("train nanoGPT", "nanoGPT's model", True),
        ("train plain", "ours, plain", True),
        ("train recompute", "recompute", False),
        ("train recompute checkpoint", "recompute, checkpoint_layers", False),
        ("train recompute offload", "recompute, checkpoint_layers, offload", False),
    )
    for name, label, learned in cases:
        of_one = 4e-9 * (parameters + learned * LONG * width)
        parts = [of_one, of_one, 2 * of_one]
        yield label, [*parts, training(rows, name)["peak_GB"] - sum(parts)]


def memory_figure(memory, attention):
    """Two panels: where the optimizer is what fills memory, and where activations are."""
    figure, axes = plt.subplots(2, 1, figsize=(10, 6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    panels = (
        ("GPT-2 XL, 1.6B parameters, 1,024 tokens", xl_bars(memory)),
        (f"GPT-2 124M, one sequence of {LONG:,} tokens, AdamW", long_bars(attention)),
    )
    for axis, (title, bars) in zip(axes, panels):
        bars = list(bars)
        for place, (_, parts) in enumerate(bars):
            left = 0
            for size, (part, colour) in zip(parts, PARTS.items()):
                axis.barh(place, size, left=left, color=colour, label=None if place else part)
                left += size
            axis.annotate(
                f"{left:.3g} GB",
                (left, place),
                va="center",
                xytext=(5, 0),
                textcoords="offset points",
            )
        axis.set_yticks(range(len(bars)), [name for name, _ in bars])
        axis.invert_yaxis()
        axis.set_title(title, loc="left")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlabel("GB at the peak of a training step on one H100")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return figure
