"""How optimizers train: loss against bytes of state, and along a run."""

import matplotlib.pyplot as plt

from experiments.report.attention_plots import plain_numbers
from experiments.report.optimizer_tables import ADAMS_MOMENTUM, PUBLISHED, compared

# Okabe and Ito's palette: a colour for each family of ours, a grey and a hollow mark for others'
MUONSN, ADAMSN, ADAFACTOR, ADAM, OTHERS = "#D55E00", "#0072B2", "#009E73", "#000000", "#777777"
LOOK = {  # variant -> colour, marker, name in the legend where it is not the variant's
    "muonsn": (MUONSN, "o"),
    "muonsn8": (MUONSN, "s"),
    "muonsn4": (MUONSN, "^"),
    "muonsn0": (MUONSN, "D"),
    "adamsn": (ADAMSN, "o"),
    "adamsn8": (ADAMSN, "s"),
    "adamsn:partition=element": (ADAMSN, "P", "adamsn, a moment per element"),
    ADAMS_MOMENTUM[0]: (ADAMSN, "<", "adamsn, 0.9 of its momentum"),
    ADAMS_MOMENTUM[1]: (ADAMSN, ">", "adamsn, all of its momentum"),
    "adafactor": (ADAFACTOR, "o"),
    "adafactor:embedding_momentum=0.9+momentum_bits=8": (
        ADAFACTOR,
        "s",
        "adafactor, momentum of embeddings",
    ),
    "torch_adamw": (ADAM, "*", "torch AdamW, tuned"),
    "adam:betas=(0.7,0.99)": (ADAM, "v", "torch AdamW, beta1 0.7"),
    "adam:role_rates={'mlp_in':2.0,'mlp_out':0.125}": (ADAM, "^", "torch AdamW, rates by role"),
    "torch_nadam": (OTHERS, "o", "torch NAdam"),
    "torch_muon": (OTHERS, "s", "torch Muon"),
    "torch_adafactor": (OTHERS, "D", "torch Adafactor"),
    "torchao_adamw8bit": (OTHERS, "^", "torchao AdamW 8 bits"),
    "torchao_adamw4bit": (OTHERS, "v", "torchao AdamW 4 bits"),
    "bitsandbytes_adamw8bit": (OTHERS, "<", "bitsandbytes AdamW 8 bits"),
    "galore_adamw": (OTHERS, ">", "GaLore"),
    "apollo_adamw": (OTHERS, "P", "APOLLO"),
    "apollo_mini": (OTHERS, "X", "APOLLO-Mini"),
    "adam_mini": (OTHERS, "p", "Adam-mini"),
    "pytorch_optimizer_adamwsn": (OTHERS, "h", "AdamWSN, pytorch_optimizer"),
    PUBLISHED: (OTHERS, "d", "AdamSN as published"),
}
PANELS = (  # setup, iterations, title: the larger first
    ("bpe51m", 1000, "51M, GPT-2 tokens"),
    ("char384", 1000, "10.7M, characters"),
    ("seed", 2000, "0.8M, characters"),
)


def optimizer_figure(rows):
    """Validation loss against bytes of state, of Adam's, at three sizes of model.

    rows: of optimizer_quality_summary.csv. Bars are 95% intervals; the dashed line is tuned
    AdamW's loss. One legend names every mark. Raises KeyError for an optimizer without a look.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 7.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    handles = {}
    for axis, (setup, iterations, title) in zip(axes, PANELS):
        for row in compared(rows, setup, iterations):
            colour, marker, *name = LOOK[row["variant"]]
            handles[row["variant"]] = axis.errorbar(
                row["state_percent"],
                row["val_loss"],
                yerr=row["interval"],
                color=colour,
                marker=marker,
                markersize=12 if marker == "*" else 8,
                markerfacecolor="none" if colour in (OTHERS, ADAM) else colour,
                linestyle="none",
                elinewidth=0.8,
                label=name[0] if name else row["variant"],
            )
            if row["variant"] == "torch_adamw":
                axis.axhline(row["val_loss"], color=ADAM, linewidth=0.8, linestyle="--")
        axis.set(title=title, xscale="log", xlabel="state, % of Adam's bytes")
        axis.set_xticks([0.1, 1, 10, 100])
        plain_numbers(axis.xaxis, "1")
        axis.minorticks_off()
        axis.grid(alpha=0.3, linewidth=0.5)
    axes[0].set_ylabel("validation loss, each at its best rates")
    figure.legend(
        handles=[handles[variant] for variant in LOOK if variant in handles],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=10,
        title="ours in colour, other packages' hollow; lower left is better",
    )
    return figure


CURVES = {"adam": "torch_adamw"}  # train.py's variants that the other CSVs call otherwise


def learning_curves_figure(rows):
    """Validation loss along a run, one line per optimizer; rows: of learning_curves.csv."""
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant and row["iteration"]]
        colour, marker, *_ = LOOK[CURVES.get(variant, variant)]
        axis.plot(
            [row["iteration"] for row in mine],
            [row["val_loss"] for row in mine],
            color=colour,
            marker=marker,
            markersize=5,
            label=f"{variant}, ends at {mine[-1]['val_loss']:.3f}",
        )
    axis.set(yscale="log", xlabel="iterations", ylabel="validation loss")
    plain_numbers(axis.yaxis, "123456789")
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axis.legend(frameon=False)
    figure.suptitle("0.8M parameters, characters of tiny Shakespeare, one seed")
    return figure
