"""Tables that follow optimizers over sizes of model: rates by width, and 124M parameters."""

from experiments.report.table_tools import label, made_on, markdown, table
from leangpt.optim import VARIANTS
from leangpt.optim.rates import own_rates

WIDTHS = {("seed", 2000): 128, ("char384", 1000): 384, ("bpe51m", 1000): 512}
LARGE = 768  # wide: GPT-2 124M
NAMES_OF_ADAMW = ("torch_adamw", "adam")  # in the small models' table and in the large one's


def finite(rows):
    return [row for row in rows if row["val_loss"] is not None]


@table("rates_by_width", "optimizer_quality_summary.csv", "optimizers_124m.csv")
def rates_by_width(summary, large):
    """The best rates of each variant's grid at four widths, and what the rule gives there."""
    found = {}
    for row in summary:
        width = WIDTHS.get((row["setup"], row["iterations"]))
        name = "adam" if row["variant"] in NAMES_OF_ADAMW else row["variant"]
        if width and name in VARIANTS:
            found[name, width] = row["learning_rate"], row["embedding_lr"]
    for name in VARIANTS:
        runs = [r for r in finite(large) if r["entrant"] == name and r["stage"] == "tune"]
        if len(runs) >= 8:  # the grid, at least
            best = min(runs, key=lambda row: row["val_loss"])
            found[name, LARGE] = best["learning_rate"], best["embedding_lr"]
    lines = []
    for name, variant in VARIANTS.items():
        cells = [label(name)]
        for width in (*WIDTHS.values(), LARGE):
            rule = own_rates(variant, width)
            best = found.get((name, width))
            grid = f"{best[0]:.2g} / {best[1]:.2g}" if best else "–"
            cells.append(f"{grid} ({rule.linear:.2g} / {rule.embedding:.2g})")
        lines.append(cells)
    header = ["best: linear / rest (rule)", *(f"{w} wide" for w in (*WIDTHS.values(), LARGE))]
    return markdown(header, lines)


@table("tuning_124m", "optimizers_124m.csv")
def tuning_124m(rows):
    """The tuning runs at 124M so far: the best of each entrant."""
    tuned = [row for row in rows if row["stage"] == "tune"]
    lines = []
    for name in dict.fromkeys(row["entrant"] for row in tuned):
        runs = [row for row in tuned if row["entrant"] == name]
        best = min(finite(runs), key=lambda row: row["val_loss"])
        lines.append(
            (
                label(name),
                len(runs),
                f"{best['val_loss']:.3f}",
                f"{best['learning_rate']:g} / {best['embedding_lr']:g}",
                f"{best['weight_decay']:g}",
                f"{best['state_bytes_per_parameter']:.2f}",
                f"{best['peak_gb']:.1f} GB",
                f"{best['iteration_ms']:.0f} ms",
                f"{best['tokens_per_s']:,}",
            )
        )
    header = [
        "entrant",
        "runs",
        "best loss",
        "lr: linear / rest",
        "decay",
        "state, bytes per parameter",
        "peak",
        "iteration",
        "tokens/s",
    ]
    return markdown(header, lines) + made_on(tuned)


@table("many_gpus", "many_gpus.csv")
def many_gpus(rows):
    """Steps on several GPUs: time, peak, share of the chips' arithmetic."""
    what = {
        "124m": "124M, {mode}, {sequences} × {T:,} tokens",
        "8b": "8B, {sequences} × {T:,} tokens, {checkpointed}",
        "long": "8B of {layers} layers, one sequence of {T:,} in {pieces} pieces, offload",
        "step": "8B, the optimizer's step alone",
        "context": "8B, one block, {T:,} tokens in {pieces} pieces",
    }
    lines = []
    alone = {row["variant"]: row["tokens_per_s"] for row in rows if row["gpus"] == 1}
    for row in sorted(rows, key=lambda row: (list(what).index(row["stage"]), row["gpus"])):
        first = row["checkpoint_first"]
        checkpointed = f"{first} layers checkpointed" if first else "all layers checkpointed"
        words = what[row["stage"]].format(**row, checkpointed=checkpointed)
        words += f", `{row['variant']}`" * bool(row["variant"])
        small = row["stage"] == "124m"
        time = f"{1000 * row['step_s']:.1f} ms" if small else f"{row['step_s']:.2f} s"
        cells = [row["gpus"], words, time]
        cells.append(f"{row['peak_GB']:.1f} GB" if row["peak_GB"] else "")
        cells += [f"{row['mfu']:.1%}" if row["mfu"] else "", f"{row['tokens_per_s'] or 0:,}"]
        share = row["tokens_per_s"] / alone[row["variant"]] / row["gpus"] if small else None
        cells.append(f"{share:.2f}" if small and row["gpus"] > 1 else "")
        lines.append([cell if cell != "0" else "" for cell in cells])
    header = ["GPUs", "what", "time", "peak a card", "of the chips", "tokens/s"]
    header.append("of as many alone")
    return markdown(header, lines) + made_on(rows)


@table("llama_one_card", "llama_one_card.csv")
def llama_one_card(rows):
    """A Llama trained whole on a card of limited memory, as train.py runs it."""
    lines = [
        (
            f"{row['parameters'] / 1e9:.2f}B",
            f"{row['card_gb']:g} GB",
            f"{row['T']:,}",
            f"{row['step_s']:.2f} s",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['gpu_peak_gb']:.2f} GB",
            f"{row['host_peak_gb']:.1f} GB",
        )
        for row in rows
    ]
    header = ["Llama", "card", "tokens", "step", "tokens/s", "peak", "host"]
    return markdown(header, lines) + made_on(rows)
