"""How true plans are: predicted against measured peaks of runs drawn at random."""

from statistics import median

from experiments.report.table_tools import figure, made_on, markdown, table
from leangpt.memory.search import CONTEXT, Budget, memory_for


def percent(share, signed=True):
    """0.0123 -> +1.23%"""
    return f"{share:+.2%}" if signed else f"{share:.2%}"


KNOWN = (1, 2)  # seeds whose draws the formulas were corrected by; those of others are fresh


def measured(rows, device, fresh=None):
    """The runs that were measured there; fresh: only those of seeds nobody corrected formulas by,
    or only the others."""
    found = [row for row in rows if row["device"] == device and row["measured"]]
    return [row for row in found if fresh is None or (row["seed"] not in KNOWN) == fresh]


def false_fits(rows):
    """Runs that took more than a device of their predicted peak and the reserve has, or ran out of
    what such a device has."""
    return [
        row
        for row in rows
        if row.get("false_fit") == "True" or row["measured"] + context(row) > device_of(row)
    ]


def device_of(row):
    """Memory of the least device that the run is planned for."""
    return memory_for(row["predicted"] + context(row), row["device"])


def context(row):
    """Bytes that CUDA takes and no allocator counts."""
    return CONTEXT * (row["device"] == "cuda")


def refused(rows):
    """(refused though they fit, fit): pairs of a run and a device with the memory that another
    run of the draws took."""
    wrong = fit = 0
    for row in rows:
        for other in rows:
            memory = other["measured"]
            if other is not row and row["measured"] <= memory:
                fit += 1
                budget = Budget(memory + context(row))
                wrong += row["predicted"] + context(row) > budget.usable(row["device"])
    return wrong, fit


def line(name, rows):
    """Cells of a table's line."""
    errors = sorted(abs(row["error"]) for row in rows)
    signed = [row["error"] for row in rows]
    return [
        name,
        len(rows),
        percent(median(errors), signed=False),
        percent(errors[len(errors) * 9 // 10], signed=False),
        f"{percent(min(signed))} to {percent(max(signed))}",
        len(false_fits(rows)),
    ]


@table("plan_accuracy", "plan_accuracy.csv")
def plan_accuracy(rows):
    """Errors by device and family."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        found = measured(rows, device)
        for family in sorted({row["family"] for row in found}):
            alike = [row for row in found if row["family"] == family]
            lines.append(line(f"{device}: {family}", alike))
        lines.append(line(f"{device}: all", found))
        for seed in sorted({row["seed"] for row in found}):
            if len(alike := [row for row in found if row["seed"] == seed]) < len(found):
                name = f"seed {seed}" if seed in KNOWN else f"seed {seed}, fresh"
                lines.append(line(f"{device}: {name}", alike))
    header = ["runs", "how many", "median error", "nine of ten within", "errors", "false fits"]
    return markdown(header, lines) + made_on(rows)


@figure("plan_runs", "plan_accuracy.csv")
def plan_runs(rows):
    """How many were measured on a CPU."""
    return f"{len(measured(rows, 'cpu'))}"


@figure("plan_fresh", "plan_accuracy.csv")
def plan_fresh(rows):
    """How many of those are of a fresh seed."""
    return f"{len(measured(rows, 'cpu', fresh=True))}"


@figure("plan_fresh_worst", "plan_accuracy.csv")
def plan_fresh_worst(rows):
    """Worst error of a fresh seed."""
    return percent(max(abs(row["error"]) for row in measured(rows, "cpu", fresh=True)), False)


@figure("plan_median", "plan_accuracy.csv")
def plan_median(rows):
    """Median error of those."""
    return percent(median(abs(row["error"]) for row in measured(rows, "cpu")), signed=False)


@figure("plan_worst", "plan_accuracy.csv")
def plan_worst(rows):
    """Worst error of those."""
    return percent(max(abs(row["error"]) for row in measured(rows, "cpu")), signed=False)


@figure("plan_refused", "plan_accuracy.csv")
def plan_refused(rows):
    """Share of fitting runs that are refused."""
    wrong, fit = refused(measured(rows, "cpu"))
    return percent(wrong / fit, signed=False)


@figure("plan_gpu_runs", "plan_accuracy.csv")
def plan_gpu_runs(rows):
    """How many were measured on a GPU."""
    return f"{len(measured(rows, 'cuda'))}"


@figure("plan_gpu_median", "plan_accuracy.csv")
def plan_gpu_median(rows):
    """Median error of those."""
    return percent(median(abs(row["error"]) for row in measured(rows, "cuda")), signed=False)


@figure("plan_gpu_nine", "plan_accuracy.csv")
def plan_gpu_nine(rows):
    """Nine of ten of them are within this."""
    errors = sorted(abs(row["error"]) for row in measured(rows, "cuda"))
    return percent(errors[len(errors) * 9 // 10], signed=False)


@figure("plan_gpu_worst", "plan_accuracy.csv")
def plan_gpu_worst(rows):
    """Worst error of them."""
    return percent(max(abs(row["error"]) for row in measured(rows, "cuda")), signed=False)


@figure("plan_gpu_refused", "plan_accuracy.csv")
def plan_gpu_refused(rows):
    """Share of fitting runs that are refused."""
    wrong, fit = refused(measured(rows, "cuda"))
    return percent(wrong / fit, signed=False)
