"""Write README.md's tables and figures from results/*.csv: no measured number is typed by hand.

  python -m experiments.report.readme_tables            rewrite every block and figure
  python -m experiments.report.readme_tables --check    exit 1 if README.md is stale, change nothing

A block in README.md is everything between `<!-- table: NAME -->` and `<!-- end table -->`; a
figure in a sentence is `<!-- figure: NAME -->0.18<!-- end -->`. NAME is a function below, or in
optimizer_tables.py, registered with the CSV it reads; to add one, write one more function.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from configurator import parse_config
from experiments.report import optimizer_tables  # noqa: F401  registers its tables
from experiments.report.table_tools import (
    FIGURES,
    TABLES,
    figure,
    gigabytes,
    made_on,
    markdown,
    megabytes,
    seconds,
    table,
)
from experiments.shared.common import RESULTS, ROOT, read_csv
from leangpt.system.errors import UserError, exit_cleanly

BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end table -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- figure: (\S+) -->).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Settings:
    check: bool = False  # only say whether README.md agrees with results/
    readme: tuple[str, ...] = (str(ROOT / "README.md"), str(ROOT / "docs/RESULTS.md"))  # the files
    results: str = str(RESULTS)  # folder of the CSV files


def time_and_peak(rows, mode):
    """One line a length, one column a policy: time (its ratio to plain's), peak."""
    rows = [row for row in rows if row["mode"] == mode]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    cells = {(row["seq"], row["policy"]): row for row in rows}

    def cell(T, policy):
        row = cells.get((T, policy))
        if row is None:
            return "–"
        ratio = row["time_vs_plain"]
        compared = "" if ratio is None or policy == "plain" else f" ({ratio:.2f}×)"
        return f"{seconds(row['time_s'])}{compared}, {megabytes(row['peak_MB'])}"

    lengths = sorted({row["seq"] for row in rows})
    return markdown(
        ["T", *policies], [[f"{T:,}", *(cell(T, policy) for policy in policies)] for T in lengths]
    ) + made_on(rows)


@table("attention_forward", "attention_scaling.csv")
def attention_forward(rows):
    return time_and_peak(rows, "forward")


@table("attention_backward", "attention_scaling.csv")
def attention_backward(rows):
    return time_and_peak(rows, "forward+backward")


@table("attention_defaults", "attention_defaults.csv")
def attention_defaults(rows):
    """`recompute` with tiles of its own choosing beside plain, both modes."""
    return "\n\n".join(
        f"{mode.replace('+', ' and ').capitalize()}:\n\n{time_and_peak(rows, mode)}"
        for mode in dict.fromkeys(row["mode"] for row in rows)
    )


@table("attention_predicted", "attention_scaling.csv")
def attention_predicted(rows):
    """The formula's peak of a forward pass beside the allocator's."""
    rows = [row for row in rows if row["predicted_MB"] is not None]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    cells = {
        (row["seq"], row["policy"]): f"{row['predicted_MB']:.1f} / {row['peak_MB']:.1f} MB"
        for row in rows
    }
    return markdown(
        ["T", *policies],
        [
            [f"{T:,}", *(cells.get((T, policy), "–") for policy in policies)]
            for T in sorted({row["seq"] for row in rows})
        ],
    ) + made_on(rows)


@table("attention_fit", "attention_scaling_fit.csv")
def attention_fit(rows):
    """How the peak grows: streams of T C numbers, and what does not grow at all."""
    return markdown(
        ["policy, mode", "grows by (T·C numbers)", "constant", "lengths", "worst residual"],
        [
            [
                f"{row['policy']}, {row['mode']}",
                f"{row['slope_streams']:.2f}",
                megabytes(row["intercept_MB"]),
                f"{row['shortest']:,}–{row['longest']:,}",
                f"{row['worst_residual']:.1%}",
            ]
            for row in rows
        ],
    ) + made_on(rows)


@table("attention_errors", "attention_scaling.csv")
def attention_errors(rows):
    """Worst error of each policy over all lengths compared."""

    def worst(policy, column):
        found = [row[column] for row in rows if row["policy"] == policy and row[column] is not None]
        return f"{max(found):.1e}" if found else "–"

    policies = dict.fromkeys(row["policy"] for row in rows)
    return markdown(
        ["policy", "output", "gradients"],
        [
            [policy, worst(policy, "max_rel_err"), worst(policy, "grad_rel_err")]
            for policy in policies
        ],
    ) + made_on(rows)


@table("attention_chunks", "attention_chunks.csv")
def attention_chunks(rows):
    """`recompute` with tiles of every size at one length."""
    return markdown(
        ["rows a tile", "time", "of plain's time", "peak"],
        [
            [
                row["q_chunk"] or "plain, no tiles",
                seconds(row["time_s"]),
                f"{row['time_vs_plain']:.2f}×",
                megabytes(row["peak_MB"]),
            ]
            for row in rows
        ],
    ) + made_on(rows)


def of_gpu(rows, prefix):
    """Rows of attention_gpu.csv whose name starts so, and a line on how they were made."""
    rows = [row for row in rows if row["name"].startswith(prefix)]
    return rows, made_on(rows)


@table("gpu_prefill", "attention_gpu.csv")
def gpu_prefill(rows):
    """12 layers of GPT-2 124M over T tokens, no gradients; time against the plain stack's."""
    rows, made = of_gpu(rows, "prefill")
    plain = {row["T"]: row for row in rows if row["q_chunk"] is None}
    return (
        markdown(
            [
                "T",
                "policy",
                "time",
                "of plain's",
                "peak beyond weights",
                "of plain's",
                "error (bf16)",
            ],
            [
                [
                    f"{row['T']:,}",
                    row["policy"]
                    + (
                        f", q={row['q_chunk']} k={row['k_chunk']}"
                        if row["q_chunk"]
                        else ", no tiles"
                    ),
                    f"{row['seconds']:.2f} s",
                    f"{row['seconds'] / plain[row['T']]['seconds']:.2f}×",
                    gigabytes(row["peak_GB"]),
                    f"{row['peak_GB'] / plain[row['T']]['peak_GB']:.0%}",
                    f"{row['out_error']:.0e}" if row["out_error"] else "–",
                ]
                for row in rows
            ],
        )
        + made
    )


@table("gpu_training", "attention_gpu.csv")
def gpu_training(rows):
    """Forward, backward and AdamW: everything counted, weights and optimizer state included."""
    short, made = of_gpu(rows, "short")
    long, made_long = of_gpu([row for row in rows if row["T"] == 65536], "train")
    million, _ = of_gpu([row for row in rows if row["T"] == 1048576], "train")
    lines = []
    for group in (short, long, million):
        medians = {
            name: median([row["seconds"] for row in group if row["name"] == name])
            for name in dict.fromkeys(row["name"] for row in group)
        }
        peers = [row for row in group if row["name"].endswith("nanoGPT")]
        for name, took in medians.items():
            row = next(row for row in group if row["name"] == name)
            lines.append(
                [
                    f"{row['B']} × {row['T']:,}",
                    name.split(" ", 1)[1],
                    f"{took:.3g} s",
                    f"{row['B'] * row['T'] / took:,.0f}",
                    f"{took / medians[peers[0]['name']]:.2f}×" if peers else "–",
                    gigabytes(row["peak_GB"]),
                    f"{row['peak_GB'] / peers[0]['peak_GB']:.0%}" if peers else "–",
                ]
            )
    return (
        markdown(
            ["B × T", "side", "step", "tokens/s", "of nanoGPT's time", "peak", "of nanoGPT's"],
            lines,
        )
        + made.rstrip(".")
        + (f" (T = 65,536: commit {long[0]['commit']}; 1,048,576: {million[0]['commit']}).")
    )


@table("gpu_errors", "attention_gpu.csv")
def gpu_errors(rows):
    """Worst relative errors of the fused bf16 paths against float32 plain PyTorch."""
    rows, made = of_gpu(rows, "check")
    kinds = {
        "tile kernels": ("check flash", "check cudnn"),
        "chunked loss": ("check loss",),
        "3-layer GPT, T = 4,096, all policies": ("check gpt",),
    }
    lines = []
    for kind, prefixes in kinds.items():
        found = [row for row in rows if row["name"].startswith(prefixes)]
        lines.append(
            [
                kind,
                f"{max(row['out_error'] for row in found):.1e}",
                f"{max(row['grad_error'] for row in found):.1e}",
            ]
        )
    return markdown(["what", "output", "gradients"], lines) + made


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


@table("long_training", "long_training.csv")
def long_training(rows):
    """One step over a long sequence on the CPU, everything counted."""
    return markdown(
        ["T", "policy", "step", "peak, everything counted"],
        [
            [f"{row['T']:,}", row["name"], f"{row['step_s']:.0f} s", gigabytes(row["peak_GB"])]
            for row in rows
        ],
    ) + made_on(rows)


@table("two_commands", "two_commands.csv")
def two_commands(rows):
    """How long the README's two commands take on a fresh copy, and what the demo prints."""
    parts = []
    for row in rows:
        training, how = row["training_seconds"], "It"
        took = f"`make {row['command']}` took {minutes(row['seconds'])}"
        if training:
            took, how = f"{took}, {training:.0f} s of it training", "Shortened, it"
        parts.append(
            f"{took} (`experiments/shared/two_commands.py`). {how} printed:\n\n"
            f"```\n{row['shown']}\n```{made_on([row])}"
        )
    return "\n\n".join(parts)


# ---------------------------------------------------------------------- figures in sentences


def minutes(value):
    return f"{value // 60:.0f} min {value % 60:.0f} s"


@figure("long_training_peak", "long_training.csv")
def long_training_peak(rows):
    """The least of the policies."""
    return f"{min(row['peak_GB'] for row in rows):.1f} GB"


@figure("gguf_error", "pretrained_check.csv")
def gguf_error(rows):
    """Largest difference of a logit."""
    return f"{of_check(rows, 'gguf')['max_abs_error']:.0e}".replace("e-0", "e-")


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


@figure("gguf_rms", "pretrained_check.csv")
def gguf_rms(rows):
    return f"{of_check(rows, 'gguf')['rms_logit']:.1f}"


def of_check(rows, name):
    return next(row for row in rows if row["check"] == name)


# ---------------------------------------------------------------------- the pages


def rows_of(what, path):
    """The CSV `path`, which `what` needs. Raises UserError where it lacks."""
    if not path.exists():
        raise UserError(
            f"{what} needs {path}, which does not exist; run the script under "
            f"experiments/ that writes {path.name}"
        )
    rows = read_csv(path)
    if not rows:
        raise UserError(f"{what} needs {path}, which has no rows")
    return rows


def rewrite(text, results):
    """README text with all blocks and figures made anew. Raises UserError for what cannot be."""

    def made(kind, registry, name):
        if name not in registry:
            raise UserError(
                f"README.md asks for a {kind} {name!r}; readme_tables.py "
                f"knows: {', '.join(sorted(registry))}"
            )
        function, files = registry[name]
        paths = [Path(results) / file for file in files]
        tables = [rows_of(f"{kind} {name!r}", path) for path in paths]
        try:
            return function(*tables)
        except (LookupError, StopIteration, ValueError) as error:  # no row, column; none to average
            raise UserError(
                f"{kind} {name!r} needs rows or columns that "
                f"{' or '.join(map(str, paths))} lacks ({error or 'no such row'}); "
                f"run the script under experiments/ that writes it"
            ) from error

    def block(match):
        opening, name, closing = match.groups()
        return f"{opening}\n{made('table', TABLES, name)}\n\n{closing}"

    def inline(match):
        opening, name, closing = match.groups()
        return f"{opening}{made('figure', FIGURES, name)}{closing}"

    return FIGURE.sub(inline, BLOCK.sub(block, text))


def main():
    settings, _ = parse_config(Settings)
    for readme in settings.readme:
        refresh(Path(readme), settings)


def refresh(readme, settings):
    """Rewrite one file, or with --check exit 1 where it is stale."""
    if not readme.exists():
        raise UserError(f"{readme} does not exist")
    text = readme.read_text()
    new = rewrite(text, settings.results)
    if settings.check:
        if new != text:
            print(
                f"{readme.name} is stale: run python -m experiments.report.readme_tables",
                file=sys.stderr,
            )
            sys.exit(1)
        print(f"{readme.name} agrees with results/")
    elif new != text:
        temporary = readme.with_suffix(".tmp")
        temporary.write_text(new)
        temporary.replace(readme)
        print(f"rewrote {readme}")


if __name__ == "__main__":
    exit_cleanly(main)
