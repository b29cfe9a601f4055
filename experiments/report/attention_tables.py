"""Tables and figures on attention: the block on a CPU, GPT-2 124M on a GPU, one long CPU step."""

from statistics import median

from experiments.report.table_tools import (
    figure,
    gigabytes,
    made_on,
    markdown,
    megabytes,
    seconds,
    table,
)


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
        ["rows per tile", "time", "of plain's time", "peak"],
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


@table("hf_llama_tiles", "hf_llama_tiles.csv")
def hf_llama_tiles(rows):
    """Training a Hugging Face Llama's layers: as they are, checkpointed, by tiles."""
    return markdown(
        ["layers run", "peak", "of the original's", "error of output", "of gradients"],
        [
            [
                row["name"],
                megabytes(row["peak_MB"]),
                f"{row['peak_MB'] / rows[0]['peak_MB']:.0%}",
                f"{row['out_error']:.0e}" if row["out_error"] else "0",
                f"{row['grad_error']:.0e}" if row["grad_error"] else "0",
            ]
            for row in rows
        ],
    ) + made_on(rows)


@figure("long_training_peak", "long_training.csv")
def long_training_peak(rows):
    """The least of the policies."""
    return f"{min(row['peak_GB'] for row in rows):.1f} GB"
