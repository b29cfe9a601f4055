"""Tables and figures on what optimizers take: bytes of memory, time a step, time to a loss."""

from statistics import median

from experiments.report.table_tools import figure, gigabytes, made_on, markdown, milliseconds, table


def timed_on(device, speeds):
    """Rows of optimizer_speed.csv: GPT-2 124M on "cpu" or "cuda"."""
    return [row for row in speeds if (row["shape"], row["device"]) == ("124m", device)]


@table("memory_variants", "optimizer_memory.csv")
def memory_variants(rows):
    """GPT-2 XL, one sequence of 1,024 tokens: bytes per parameter, and the whole peak."""
    rows = [row for row in rows if row["part"] == "variants"]
    return markdown(
        [
            "optimizer",
            "weights",
            "gradients",
            "bytes per parameter: state",
            "weights + gradients + state",
            "peak of a training step",
        ],
        [
            [
                f"`{row['variant']}`",
                row["weights"],
                "freed inside backward" if row["fused_backward"] == "True" else row["weights"],
                f"{row['state_bytes'] / row['parameters']:.3f}",
                f"{row['bytes_per_parameter']:.2f}",
                gigabytes(row["peak_bytes"] / 1e9),
            ]
            for row in rows
        ],
    ) + made_on(rows)


@table("memory_largest", "optimizer_memory.csv")
def memory_largest(rows):
    """Models that trained on one GPU, three whole steps each."""
    rows = [row for row in rows if row["part"] == "largest" and row["fits"] == "True"]
    return markdown(
        ["parameters", "bytes per parameter", "peak", "a step", "loss on one batch, 3 steps"],
        [
            [
                f"{row['parameters'] / 1e9:.1f}B",
                f"{row['bytes_per_parameter']:.2f}",
                gigabytes(row["peak_bytes"] / 1e9),
                f"{row['step_seconds']:.1f} s",
                f"{row['loss_first']:.2f} → {row['loss_last']:.2f}",
            ]
            for row in rows
        ],
    ) + made_on(rows)


@table("optimizer_speed", "optimizer_speed.csv")
def optimizer_speed(rows):
    """One step on 124M parameters against torch's fused AdamW, and the bytes of state."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = timed_on(device, rows)
        parts.append(
            markdown(
                ["optimizer", "a step", "of fused AdamW's", "state, bytes per parameter"],
                [
                    [
                        f"`{row['variant']}`",
                        milliseconds(row["step_ms"]),
                        f"{row['ratio']:.2f}×",
                        f"{row['state_bytes'] / row['parameters']:.2f}",
                    ]
                    for row in sorted(mine, key=lambda row: row["ratio"])
                ],
            )
            + made_on(mine)
        )
    return "\n\n".join(parts)


@table("time_to_loss", "time_to_loss.csv")
def time_to_loss(rows):
    """Seconds of training until nanoGPT's final loss."""
    return markdown(
        ["recipe", "seed", "reached", "iterations", "training time"],
        [
            [
                row["side"],
                row["seed"],
                "yes" if row["reached"] == "True" else "no",
                row["iterations"],
                f"{row['seconds']:.1f} s",
            ]
            for row in rows
        ],
    ) + made_on(rows)


@figure("muonsn8_step", "optimizer_speed.csv")
def muonsn8_step(rows):
    """More than fused AdamW's, GPT-2 124M on a GPU."""
    row = next(row for row in timed_on("cuda", rows) if row["variant"] == "muonsn8")
    return f"{row['step_ms'] - row['adamw_ms']:.1f} ms"


@figure("muonsn_cpu_step", "optimizer_speed.csv")
def muonsn_cpu_step(rows):
    """Of fused AdamW's, GPT-2 124M on a CPU."""
    row = next(row for row in timed_on("cpu", rows) if row["variant"] == "muonsn")
    return f"{row['ratio']:.0f}"


@figure("short_step", "attention_gpu.csv")
def short_step(rows):
    """One training step of GPT-2 124M, 32 sequences of 1,024 tokens, with AdamW."""
    times = [row["seconds"] for row in rows if row["name"] == "short plain"]
    return f"{1e3 * median(times):.0f} ms"


@figure("low_byte_bytes", "optimizer_memory.csv")
def low_byte_bytes(rows):
    """Of weights and state, `muonsn8` in bfloat16 with updates inside backward."""
    row = next(
        row
        for row in rows
        if (row["part"], row["variant"], row["fused_backward"]) == ("variants", "muonsn8", "True")
    )
    return f"{row['bytes_per_parameter']:.2f} bytes"


@figure("adam_bytes", "optimizer_memory.csv")
def adam_bytes(rows):
    """Of weights, gradients and state, AdamW in float32."""
    row = next(row for row in rows if (row["part"], row["variant"]) == ("variants", "adam"))
    return f"{row['bytes_per_parameter']:.0f}"


@figure("largest_model", "optimizer_memory.csv")
def largest_model(rows):
    """Parameters of the largest that fitted."""
    fitting = [row for row in rows if row["part"] == "largest" and row["fits"] == "True"]
    return f"{max(row['parameters'] for row in fitting) / 1e9:.1f}B"
