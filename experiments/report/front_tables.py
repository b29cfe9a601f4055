"""The front page: three numbers, what the commands print, what fits, which knob, six optimizers."""

import re
from statistics import median

from experiments.report.memory_tables import timed_on
from experiments.report.table_tools import (
    figure,
    gigabytes,
    markdown,
    megabytes,
    minutes,
    row_with,
    table,
)

WIDEST = 96  # characters of a printed line that a page shows
LEFT_OUT = ("  because", "attention", "step 0")  # of the demo's lines: ten remain
CARDS = (4, 8, 12, 16, 24, 32, 40, 48, 80)  # GiB of memory
USABLE = 0.93  # of a card: the driver, the CUDA context and fragments have the rest
GPT2, XL = "GPT-2 124M", "GPT-2 XL, 1.6B"


def training(rows, name):
    """The row of attention_gpu.csv of that name; T = 65,536 where there are several."""
    found = [row for row in rows if row["name"] == name]
    return min(found, key=lambda row: row["T"])


def xl(rows, variant, weights="float32", fused="False"):
    """The row of optimizer_memory.csv for GPT-2 XL."""
    return row_with(
        rows, part="variants", variant=variant, weights=weights, fused_backward=fused, shape="xl"
    )


# ---------------------------------------------------------------------- what commands print


@table("two_commands", "two_commands.csv")
def two_commands(rows):
    """How long `make demo` takes on a fresh copy, and ten lines of what it prints."""
    row = row_with(rows, command="demo")
    shown = [line for line in row["shown"].splitlines() if not line.startswith(LEFT_OUT)]
    shown = [line if len(line) <= WIDEST else cut(line) for line in shown]
    return (
        f"`make demo` took {minutes(row['seconds'])} ({row['machine']}; commit {row['commit']}) "
        f"and printed, shortened:\n\n```\n" + "\n".join(shown) + "\n```"
    )


def cut(line):
    """A printed line up to the last of its items that a page has room for."""
    return re.sub(r"([,;]) [^,;]*$", r"\1 …", line[: WIDEST - 1])


# ---------------------------------------------------------------------- what fits, which knob


def fitting(peak_bytes):
    """The smallest card (GiB) that `peak_bytes` fit. Raises LookupError where none does."""
    cards = [card for card in CARDS if peak_bytes <= USABLE * card * 2**30]
    if not cards:
        raise LookupError(f"a card for {peak_bytes} bytes")
    return cards[0]


@table("what_fits", "attention_gpu.csv", "optimizer_memory.csv")
def what_fits(attention, memory):
    """The smallest card for each measured training step, beside what the plain way takes."""
    plain = gigabytes(training(attention, "train nanoGPT")["peak_GB"])
    short = gigabytes(training(attention, "short nanoGPT")["peak_GB"])
    adam = gigabytes(xl(memory, "adam")["peak_bytes"] / 1e9)
    tiles = "recompute, checkpoint_layers"
    low = "bfloat16 weights, fused_backward"

    def of_attention(name):
        return 1e9 * training(attention, name)["peak_GB"]

    cases = [
        (f"{GPT2}, 32 × 1,024", tiles, of_attention("short checkpoint"), short),
        (f"{GPT2}, 65,536", f"{tiles}, offload", of_attention("train recompute offload"), plain),
        (f"{GPT2}, 65,536", "recompute", of_attention("train recompute"), plain),
        (f"{XL}, 1,024", f"adafactor, {low}", xl(memory, "adafactor", "bfloat16", "True"), adam),
        (f"{XL}, 1,024", f"muonsn8, {low}", xl(memory, "muonsn8", "bfloat16", "True"), adam),
        (f"{XL}, 1,024", "muonsn8", xl(memory, "muonsn8"), adam),
    ]
    million = [row for row in attention if row["T"] == 1048576 and row["section"] == "million"]
    cases.append((f"{GPT2}, 1,048,576", tiles, 1e9 * million[0]["peak_GB"], ""))
    largest = [row for row in memory if row["part"] == "largest" and row["fits"] == "True"]
    for row in (largest[0], largest[-1]):
        model = f"{row['parameters'] / 1e9:.1f}B, {row['tokens']:,}"
        cases.append((model, f"muonsn8, {low}, checkpoint_layers", row, ""))
    lines = []
    for model, settings, peak, other in cases:
        peak = peak["peak_bytes"] if isinstance(peak, dict) else peak
        card = fitting(peak)
        peak, beside = gigabytes(peak / 1e9), f" of {other}" if other else ""
        lines.append((card, model, settings, peak.removesuffix(" GB" if other else "") + beside))
    lines.sort(key=lambda line: line[0])
    return markdown(
        ["card: model, tokens", "settings", "peak, of plain's"],
        [[f"{card} GB: {model}", *rest] for card, model, *rest in lines],
        words=3,
    )


@table(
    "which_knob",
    "attention_gpu.csv",
    "optimizer_memory.csv",
    "optimizer_speed.csv",
    "generation.csv",
)
def which_knob(attention, memory, speeds, generation):
    """Symptom, setting, what it gives and takes, and when it does nothing."""

    def trained(before, after):
        a, b = (training(attention, name) for name in (before, after))
        mine = [row["seconds"] for row in attention if row["name"] == after and row["T"] == b["T"]]
        slower = median(mine) / a["seconds"]
        return f"{gigabytes(a['peak_GB'])} → {gigabytes(b['peak_GB'])}, {slower:.2f}× the time"

    def stepped(before, after):
        a, b = (gigabytes(row["peak_bytes"] / 1e9) for row in (before, after))
        return f"{a} → {b}"

    muonsn8 = row_with(timed_on("cuda", speeds), variant="muonsn8")
    slower = f"{muonsn8['step_ms'] - muonsn8['adamw_ms']:.1f} ms more per step of {GPT2}"
    long = {
        kv: row_with(generation, part="gpu", weights="bfloat16", kv=kv, context=131072)
        for kv in ("bfloat16", "int4")
    }
    int4 = row_with(generation, part="gpu", contestant="ours", weights="int4", context=64)
    exact = row_with(
        generation, part="gpu", contestant="ours", weights="bfloat16", context=64, batch=1
    )
    lines = [
        (
            "long sequences",
            "`attention_policy` recompute",
            trained("train plain", "train recompute"),
            "below 24,576 tokens (CPU: 12,288) unless `q_chunk` is set",
        ),
        (
            "many layers, large batches",
            "`checkpoint_layers`",
            trained("short plain", "short checkpoint"),
            "on a CPU with tiles",
        ),
        (
            "the layers' inputs, at length",
            "`offload`",
            trained("train recompute checkpoint", "train recompute offload"),
            "on a CPU, or over short texts",
        ),
        (
            "optimizer state",
            "`optimizer_variant` muonsn8",
            f"{stepped(xl(memory, 'adam'), xl(memory, 'muonsn8'))}, {slower}",
            "in small models over long texts",
        ),
        (
            "weights and gradients",
            "`param_dtype` bfloat16 and `fused_backward`",
            stepped(xl(memory, "muonsn8"), xl(memory, "muonsn8", "bfloat16", "True")),
            "(their sum, where micro-batches add up, takes a byte a weight)",
        ),
        (
            "K and V while sampling",
            "`kv_bits` 4",
            f"{megabytes(long['bfloat16']['peak_MB'])} → {megabytes(long['int4']['peak_MB'])}, "
            f"{long['int4']['ms_per_step'] / long['bfloat16']['ms_per_step']:.2f}× the time",
            "at short contexts",
        ),
        (
            "weights while sampling",
            "`int4`",
            f"{megabytes(exact['peak_MB'])} → {megabytes(int4['peak_MB'])}, "
            f"{int4['ms_per_step'] / exact['ms_per_step']:.2f}× the time",
            "in large batches",
        ),
    ]
    return markdown(
        ["memory is full of → setting", "memory, time", "does nothing"],
        [[f"{symptom} → {setting}", *rest] for symptom, setting, *rest in lines],
        words=3,
    )


# ---------------------------------------------------------------------- long sequences


@table("front_long", "attention_gpu.csv")
def front_long(rows):
    """Training steps over 65,536 tokens, beside nanoGPT's model."""
    rows = [row for row in rows if row["section"] == "train"]
    peer = training(rows, "train nanoGPT")
    return markdown(
        ["policy", "peak, of nanoGPT's", "step, of nanoGPT's"],
        [
            [
                row["name"].removeprefix("train ").replace(" ", " + "),
                f"{gigabytes(row['peak_GB'])} ({row['peak_GB'] / peer['peak_GB']:.0%})",
                f"{row['seconds']:.2f} s ({row['seconds'] / peer['seconds']:.2f}×)",
            ]
            for row in rows
        ],
    )


@figure("long_peak", "attention_gpu.csv")
def long_peak(rows):
    """GPT-2 124M over 65,536 tokens, everything counted, at its least."""
    return gigabytes(training(rows, "train recompute offload")["peak_GB"])


@figure("long_plain_peak", "attention_gpu.csv")
def long_plain_peak(rows):
    """The same in nanoGPT's model, compiled."""
    return gigabytes(training(rows, "train nanoGPT")["peak_GB"])


@figure("long_time", "attention_gpu.csv")
def long_time(rows):
    """What that takes, of nanoGPT's time."""
    ours, theirs = (training(rows, f"train {name}") for name in ("recompute offload", "nanoGPT"))
    return f"{ours['seconds'] / theirs['seconds']:.2f}×"


# ---------------------------------------------------------------------- six optimizers

SIX = {  # variant -> where it loses, with what is measured of it
    "torch_adamw": "memory: two float32 moments of each weight",
    "adamsn8": "to AdamW on 10.7M: its momentum is a share of the update",
    "adafactor": "to AdamW on larger models: no momentum",
    "muonsn8": "time: a step is {gpu} AdamW's on a GPU, {cpu} on a CPU",
    "muonsn4": "to `muonsn8` by a little; the same time",
    "muonsn0": "to `muonsn8` at all sizes: no momentum",
}
OF_OURS = {"torch_adamw": "adam"}  # the CSVs' name -> the one `--optimizer_variant` takes
SIZES = (("seed", 2000), ("char384", 1000), ("bpe51m", 1000))  # 0.8M, 10.7M, 51M parameters


@table("front_optimizers", "optimizer_quality_summary.csv", "optimizer_speed.csv")
def front_optimizers(rows, speeds):
    """State, and losses against tuned AdamW at three sizes."""
    lines = []
    for variant, loses in SIX.items():
        found = [
            row_with(rows, setup=setup, iterations=iterations, variant=variant)
            for setup, iterations in SIZES
        ]
        state = row_with(timed_on("cuda", speeds), variant=variant)
        state = state["state_bytes"] / state["parameters"]
        times = {
            name: row["ratio"]
            for name, device in (("gpu", "cuda"), ("cpu", "cpu"))
            for row in timed_on(device, speeds)
            if row["variant"] == variant
        }
        if "{cpu}" in loses:
            loses = loses.format(gpu=f"{times['gpu']:.1f}×", cpu=f"{times['cpu']:.0f}×")
        against = " / ".join(f"{row['to_adamw']:+.2f}" for row in found).replace("-0.00", "0.00")
        lines.append(
            [
                f"`{OF_OURS.get(variant, variant)}`",
                f"{state:.2f}" if state >= 0.1 else f"{state:.3f}",
                "–" if variant == "torch_adamw" else against.replace("-", "−"),
                loses,
            ]
        )
    columns = ["optimizer", "bytes", "loss", "where it loses"]
    return markdown(columns, lines, words=4)
