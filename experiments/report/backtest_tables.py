"""The formulas of plan.py against peaks that a GPU measured before they were written."""

from experiments.optimizers.optimizer_memory import SHAPES
from experiments.report.table_tools import gigabytes, made_on, markdown, table
from leangpt.memory.formulas import moments
from leangpt.memory.run import Run
from model import GPTConfig

GPT2 = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304)
LONG = dict(attention_policy="recompute", position="none")
# rows of attention_gpu.csv: name -> what experiments/attention/attention_gpu.py makes of it
ATTENTION = {
    "short plain": {},
    "short recompute": dict(attention_policy="recompute"),
    "short checkpoint": dict(attention_policy="recompute", checkpoint_layers=True),
    "train plain": {},
    "train recompute": LONG,
    "train recompute checkpoint": dict(LONG, checkpoint_layers=True),
    "train recompute offload": dict(LONG, checkpoint_layers=True, offload=True),
}


@table("plan_backtest", "optimizer_memory.csv", "attention_gpu.csv")
def plan_backtest(memory, attention):
    """A row a run: what it was, predicted and measured peak, the error."""
    cases = [*optimizers(memory), *lengths(attention)]
    lines = [
        [
            what,
            gigabytes(predicted / 1e9),
            gigabytes(row_peak / 1e9),
            f"{predicted / row_peak - 1:+.1%}",
        ]
        for what, predicted, row_peak, _ in cases
    ]
    return markdown(["run", "predicted", "measured", "error"], lines) + made_on(
        [row for *_, row in cases]
    )


def optimizers(rows):
    """(what, predicted bytes, measured bytes, row) of each run of optimizer_memory.csv on a GPU."""
    for row in rows:
        if row["fits"] != "True" or "threads" in row["machine"]:
            continue
        fused, checkpoint = (
            row[name] == "True" for name in ("fused_backward", "checkpoint_layers")
        )
        layers, heads, width = SHAPES[row["shape"]]
        config = GPTConfig(
            block_size=row["tokens"],
            n_layer=layers,
            n_head=heads,
            n_embd=width,
            checkpoint_layers=checkpoint,
        )
        size = 2 if row["weights"] == "bfloat16" else 4
        options = {"fused_backward": True} if fused else {}
        run = Run(config, 1, None, 1, row["variant"], options, size, 2, "cuda")
        words = [f"{row['parameters'] / 1e9:.1f}B `{row['variant']}`"]
        words += ["bfloat16 weights"] * (size == 2) + ["fused_backward"] * fused
        words += ["checkpoint_layers"] * checkpoint
        yield ", ".join(words), peak(run), row["peak_bytes"], row


def lengths(rows):
    """The same of attention_gpu.csv: GPT-2 124M under AdamW; of rounds the first."""
    seen = set()
    for row in rows:
        name = row["name"]
        if name not in ATTENTION or row["status"] != "ok" or (name, row["T"]) in seen:
            continue
        seen.add((name, row["T"]))
        settings = ATTENTION[name]
        compiled = name in ("short plain", "short recompute", "train plain")
        config = GPTConfig(block_size=row["T"], **GPT2 | settings)
        run = Run(config, row["B"], None, 1, "adam", {}, 4, 2, "cuda", compiled=compiled)
        words = [name.removeprefix("short ").removeprefix("train "), f"{row['B']} × {row['T']:,}"]
        yield "124M " + ", ".join(words), peak(run), 1e9 * row["peak_GB"], row


def peak(run):
    """Bytes at the fullest moment, as an allocator counts them."""
    return max(sum(parts.values()) for parts in moments(run).values())
