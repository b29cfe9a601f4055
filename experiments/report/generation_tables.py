"""Tables and figures on generation: tokens a second, and what rounding costs."""

import math
from statistics import fmean, stdev

from experiments.report.table_tools import figure, made_on, markdown, megabytes, table


@table("generation", "generation.csv")
def generation(rows):
    """Tokens a second, one column a context length."""
    rows = [row for row in rows if row["part"] == "cpu"]
    contexts = sorted({row["context"] for row in rows})
    kinds = list(dict.fromkeys((row["contestant"], row["weights"], row["kv"]) for row in rows))
    found = {(row["contestant"], row["weights"], row["kv"], row["context"]): row for row in rows}
    return markdown(
        [
            "who",
            "weights",
            "K and V",
            *(f"context {context:,}" for context in contexts),
            "read, of the memory's speed",
        ],
        [
            [
                who,
                weights,
                kv or "–",
                *(
                    f"{found[who, weights, kv, context]['tokens_per_s']:.1f}"
                    for context in contexts
                ),
                f"{found[who, weights, kv, contexts[0]]['GB_per_s']:.1f} of "
                f"{found[who, weights, kv, contexts[0]]['memory_GB_per_s']:.0f} GB/s",
            ]
            for who, weights, kv in kinds
        ],
    ) + made_on(rows)


@table("generation_gpu", "generation.csv")
def generation_gpu(rows):
    """Decoding on a GPU: tokens a second in all, bytes a second, and the peak."""
    rows = [row for row in rows if row["part"] == "gpu" and row["tokens_per_s"]]
    rows.sort(key=lambda row: (row["batch"], row["context"], row["contestant"]))
    return markdown(
        [
            "context",
            "batch",
            "who",
            "weights",
            "K and V",
            "tokens/s",
            "read, of the memory's speed",
            "peak",
        ],
        [
            [
                f"{row['context']:,}",
                row["batch"],
                row["contestant"],
                row["weights"],
                row["kv"],
                f"{row['tokens_per_s']:,.0f}",
                f"{row['GB_per_s']:,.0f} of {row['memory_GB_per_s']:,.0f} GB/s",
                megabytes(row["peak_MB"]) if row["peak_MB"] else "–",
            ]
            for row in rows
        ],
    ) + made_on(rows)


@table("generation_quality", "generation_quality.csv")
def generation_quality(rows):
    """Loss change of 4-bit weights and quantised K and V; several seeds become mean ± spread."""
    runs = {}
    for row in rows:
        row = {"model": "characters", "divergence": math.nan} | row  # not in older files
        runs.setdefault(
            tuple(row[k] for k in ("model", "what", "rule", "group", "bits")), []
        ).append(row)
    lines = []
    for (model, what, rule, group, bits), found in runs.items():
        loss, change, divergence = (
            [row[k] for row in found] for k in ("loss", "change", "divergence")
        )
        if loss[0] is None:  # timed only
            continue
        lines.append(
            [
                model,
                what,
                rule + (f", {len(found)} texts" if len(found) > 1 else ""),
                group or "–",
                f"{bits:.2f}",
                f"{fmean(loss):.4f}",
                f"{fmean(change):+.4f}" + (f" ± {stdev(change):.4f}" if len(found) > 1 else ""),
                f"{100 * math.expm1(fmean(change)):+.2f}%",
                "–" if math.isnan(divergence[0]) else f"{fmean(divergence):.4f}",
            ]
        )
    return markdown(
        [
            "model",
            "what",
            "rounded by",
            "group",
            "bits",
            "loss",
            "change",
            "perplexity",
            "divergence",
        ],
        lines,
    ) + made_on(rows)


@figure("gguf_error", "pretrained_check.csv")
def gguf_error(rows):
    """Largest difference of a logit."""
    return f"{of_check(rows, 'gguf')['max_abs_error']:.0e}".replace("e-0", "e-")


@figure("gguf_rms", "pretrained_check.csv")
def gguf_rms(rows):
    return f"{of_check(rows, 'gguf')['rms_logit']:.1f}"


def of_check(rows, name):
    return next(row for row in rows if row["check"] == name)


@figure("rounding_seconds", "generation_quality.csv")
def rounding_seconds(rows):
    """How long GPT-2 124M's shape takes to quantise."""
    return f"{next(row for row in rows if row['model'] == 'GPT-2 124M shape')['seconds']:.0f}"


@figure("smollm2_rounding", "generation_quality.csv")
def smollm2_rounding(rows):
    """What calibrated 4 bits cost SmolLM2's perplexity, the mean of its seeds."""
    changes = [
        row["change"]
        for row in rows
        if row["model"] == "SmolLM2-135M" and row["rule"] == "calibrated"
    ]
    return f"{100 * math.expm1(fmean(changes)):.1f}%"
