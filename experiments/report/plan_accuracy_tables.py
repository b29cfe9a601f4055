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
    """Runs that took more than a device of their predicted peak and the reserve has."""
    return [row for row in rows if row["measured"] + context(row) > device_of(row)]


def device_of(row):
    """Memory of the least device that the run is planned for."""
    return memory_for(row["predicted"] + context(row), row["device"])


def context(row):
    """Bytes that CUDA takes and no allocator counts."""
    return CONTEXT * (row["device"] == "cuda")


LIMITED = "2ffd7b2"  # the commit whose runs were held to 3.5% and 128 MB less than a device
LEAST_CARD = 4 * 10**9  # bytes of the smallest GPU that counts


def refused(rows):
    """(refused though they fit, fit): pairs of a run and a device with the memory that another
    run of the draws took; of GPUs those that are sold: of LEAST_CARD and more."""
    wrong = fit = 0
    for row in rows:
        for other in rows:
            memory = other["measured"] + context(other)
            if row["device"] == "cuda" and memory < LEAST_CARD:
                continue
            if other is not row and row["measured"] + context(row) <= memory:
                fit += 1
                budget = Budget(memory)
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


def figures(prefix, device):
    """Register what the page says of a device's runs."""

    def put(name, of_rows):
        figure(f"{prefix}_{name}", "plan_accuracy.csv")(
            lambda rows: of_rows(measured(rows, device))
        )

    def errors(rows):
        return sorted(abs(row["error"]) for row in rows)

    put("runs", lambda rows: str(len(rows)))
    put("median", lambda rows: percent(median(errors(rows)), signed=False))
    put("nine", lambda rows: percent(errors(rows)[len(rows) * 9 // 10], signed=False))
    put("worst", lambda rows: percent(errors(rows)[-1], signed=False))
    put("refused", lambda rows: percent((lambda w, f: w / f)(*refused(rows)), signed=False))


figures("plan", "cpu")
figures("plan_gpu", "cuda")


@figure("plan_gpu_range", "plan_accuracy.csv")
def plan_gpu_range(rows):
    """How large the runs on a GPU are."""
    found = measured(rows, "cuda")
    size = {"float32": 4, "bfloat16": 2}
    parameters = max(row["weights"] / size[row["param_dtype"]] for row in found)
    compiled = sum(row["compile"] == "True" for row in found)
    return (
        f"up to {parameters / 1e9:.1f}B parameters, {max(row['block_size'] for row in found):,} "
        f"tokens and {max(row['measured'] for row in found) / 1e9:.0f} GB; {compiled} compiled"
    )


@figure("plan_gpu_ran_out", "plan_accuracy.csv")
def plan_gpu_ran_out(rows):
    """How many ran out of what a device of their plan has, with the reserve of LIMITED."""
    found = [row for row in measured(rows, "cuda") if row["commit"] == LIMITED]
    return f"{sum(row['ran_out'] == 'True' for row in found)} of {len(found)}"


@figure("plan_fresh", "plan_accuracy.csv")
def plan_fresh(rows):
    """How many runs on a CPU are of a fresh seed."""
    return f"{len(measured(rows, 'cpu', fresh=True))}"


@figure("plan_fresh_worst", "plan_accuracy.csv")
def plan_fresh_worst(rows):
    """Worst error of a fresh seed."""
    return percent(max(abs(row["error"]) for row in measured(rows, "cpu", fresh=True)), False)
