"""How true plans of several processes are: drawn runs, and steps that GPUs took."""

from experiments.report.plan_accuracy_tables import line, percent
from experiments.report.table_tools import made_on, markdown, table
from experiments.scale.many_gpus import SHAPES, Case, run_of
from leangpt.memory.formulas import peak
from model import GPTConfig


@table("plan_ranks", "plan_ranks.csv")
def plan_ranks(rows):
    """Errors by how processes share a run."""
    rows = [row | {"device": "cpu"} for row in rows]
    lines = []
    for family in sorted({row["family"] for row in rows}):
        lines.append(line(family, [row for row in rows if row["family"] == family]))
    lines.append(line("all", rows))
    header = ["runs", "how many", "median error", "nine of ten within", "errors", "false fits"]
    return markdown(header, lines) + made_on(rows)


@table("plan_many_gpus", "many_gpus.csv")
def plan_many_gpus(rows):
    """Peaks of steps on several GPUs, as today's formulas predict them."""
    lines = []
    for row in rows:
        if row["stage"] not in ("124m", "8b", "long", "70b") or not row["peak_GB"]:
            continue
        case = Case(**{name: value(row[name]) for name in Case.__dataclass_fields__})
        predicted = predicted_bytes(case, row["gpus"]) / 1e9
        fewer = f", {case.layers} layers" if case.layers else ""
        fewer += f", {case.checkpoint_first} checkpointed" if case.checkpoint_first else ""
        lines.append(
            [
                f"{case.model}{fewer}, `{case.variant}`",
                f"{row['gpus']}: {case.mode}{', pieces' if case.pieces > 1 else ''}",
                f"{case.sequences} x {case.T:,}",
                f"{predicted:.1f} GB",
                f"{row['peak_GB']:.1f} GB",
                percent(predicted / row["peak_GB"] - 1),
            ]
        )
    header = ["model", "GPUs", "tokens a step", "predicted", "measured", "error"]
    return markdown(header, lines) + made_on(rows)


def value(text):
    """A cell of the CSV as the Case has it."""
    return {"True": True, "False": False}.get(text, text)


def predicted_bytes(case, gpus):
    """Of a case on cards of 80 GB."""
    shape = SHAPES["full"][case.model] | dict(block_size=case.T, offload=case.offload)
    shape |= {"n_layer": case.layers} if case.layers else {}
    config = GPTConfig(**shape, checkpoint_first=case.checkpoint_first or None)
    run = run_of(case, config, gpus, 2 if case.inside else 4, 2, "cuda", 80 * 10**9)
    return sum(peak(run)[1].values())
