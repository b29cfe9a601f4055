"""Runs side by side: `python compare.py out-a out-b ...`, a table and a picture of their curves.

The folders are out_dirs of train.py, of runs that are over or still going on, or nanoGPT's, which
hold a checkpoint only. The table has the settings that differ, the final and the best validation
loss, bytes of optimizer state, the allocator's exact peak, tokens per second (median of those
logged) and seconds of training; a dash stands for what a folder does not tell. Below it: who used
other data, other commits, other machines. MB are 10^6 bytes.
"""

import csv
import io
import shutil
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from configurator import parse_config
from leangpt.runs.curves import curves_figure
from leangpt.runs.run import Run, differences, groups, read_run, same_data, settings_that_differ
from leangpt.system.errors import UserError, exit_cleanly, refused
from leangpt.system.whole_files import write_whole

PICTURES = ("png", "svg", "pdf")
SHOWN = {  # column on the screen -> its text for one run
    "run": lambda run: run.name,
    "iterations": lambda run: progress(run),
    "final": lambda run: number(run.final, ".4f"),
    "best": lambda run: number(run.best and run.best[0], ".4f"),
    "at": lambda run: number(run.best and run.best[1], ","),
    "state MB": lambda run: number(run.state_bytes, ",.2f", 1e6),
    "peak MB": lambda run: number(run.peak_bytes, ",.1f", 1e6),
    "tokens/s": lambda run: number(run.tokens_per_s, ",.0f"),
    "seconds": lambda run: number(run.seconds, ",.1f"),
}
CSV_COLUMNS = {  # column of --csv -> its value for one run, None where the folder does not tell
    "run": lambda run: run.name,
    "iterations": lambda run: run.iteration,
    "max_iters": lambda run: run.settings.get("max_iters"),
    "final_val_loss": lambda run: run.final,
    "best_val_loss": lambda run: run.best and run.best[0],
    "best_iteration": lambda run: run.best and run.best[1],
    "top_lr": lambda run: run.top_rate,
    "parameters": lambda run: run.parameters,
    "state_bytes": lambda run: run.state_bytes,
    "peak_bytes": lambda run: run.peak_bytes,
    "tokens_per_s": lambda run: run.tokens_per_s,
    "seconds": lambda run: run.seconds,
    "dataset": lambda run: run.dataset["name"],
    "tokenizer": lambda run: run.dataset.get("tokenizer"),
    "data_sha256": lambda run: run.dataset.get("sha256"),
    "machine": lambda run: run.facts.get("machine"),
    "torch": lambda run: run.facts.get("torch"),
    "commit": lambda run: run.facts.get("commit"),
}


@dataclass
class Settings:
    """Which runs, and where their picture goes."""

    runs: tuple[str, ...] = field(
        default=(), metadata={"positional": True, "help": "folders of runs; --runs may be left out"}
    )
    out: str = "compare.png"  # the picture: .png, .svg or .pdf
    csv: str | None = None  # also write the table, with more columns, to this file


def main(argv=None):
    """Print the table of the runs, then draw their curves."""
    settings, _ = parse_config(Settings, argv)
    kind = Path(settings.out).suffix.lstrip(".").lower()
    if kind not in PICTURES:
        raise UserError(f"--out={settings.out}: a picture's name ends in .{', .'.join(PICTURES)}")
    runs = read_runs(settings.runs)
    print("\n".join(table(runs, shutil.get_terminal_size((120, 24)).columns) + notes(runs)))
    if settings.csv:
        write_file("csv", settings.csv, csv_text(runs).encode(errors="backslashreplace"))
        print(f"table in {settings.csv}")
    picture = io.BytesIO()
    curves_figure(runs).savefig(picture, format=kind, dpi=150)
    write_file("out", settings.out, picture.getvalue())
    print(f"picture in {settings.out}")


def read_runs(folders):
    """The runs in the folders, in their order, each once. Raises UserError for one without any."""
    if not folders:
        raise UserError("which runs? give their folders: python compare.py out-a out-b")
    once = {}
    for name in folders:
        once.setdefault(Path(name).resolve(), name.rstrip("/") or name)
    found = {name: read_run(name) for name in once.values()}
    if missing := [name for name, run in found.items() if run is None]:
        raise UserError(
            f"no run in {', '.join(missing)}: the folder of a run holds the metrics.csv or ckpt.pt "
            "that training leaves there"
        )
    return list(found.values())


# ---- the table -----------------------------------------------------------------------------------


def table(runs: list[Run], width: int) -> list[str]:
    """The lines of the table; the settings that differ stand below it where `width` is too small.

    A run's settings that no other run has another value for are left out.
    """
    rows = [list(SHOWN), *([cell(run) for cell in SHOWN.values()] for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(SHOWN))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    different = differences(runs)
    if not any(different):
        return lines
    beside = [f"{line}  {text}" for line, text in zip(lines, ["settings that differ", *different])]
    if max(map(len, beside)) <= width:
        return beside
    lines += ["", "settings that differ"]
    for run, text in zip(runs, different):
        text = f"{run.name.ljust(widths[0])}  {text or '-'}"
        lines += textwrap.wrap(text, max(width, 40), subsequent_indent=" " * 4) or [text]
    return lines


def progress(run):
    """'2,000', or '740 of 2,000' where the run is not at its end."""
    last = run.settings.get("max_iters")
    of = f" of {last:,}" if isinstance(last, int) and run.iteration < last else ""
    return f"{run.iteration:,}{of}"


def number(value, form, unit=1):
    """A number as text, a dash for None."""
    return "-" if value is None else format(value / unit if unit != 1 else value, form)


def csv_text(runs: list[Run]) -> str:
    """The table as CSV, a row per run: CSV_COLUMNS, then the settings that differ."""
    names = settings_that_differ(runs)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS, *names])
    for run in runs:
        known = [cell(run) for cell in CSV_COLUMNS.values()]
        writer.writerow([*known, *(run.settings.get(name) for name in names)])
    return file.getvalue()


def write_file(flag, path, content):
    """Write bytes to a file that the user named, whole or not at all (a device, as it takes them).
    Raises UserError where that fails."""
    try:
        if Path(path).is_file() or Path(path).parent.is_dir() and not Path(path).exists():
            write_whole(path, content)
        else:  # a device, a folder, or in none
            Path(path).write_bytes(content)
    except OSError as error:
        raise refused(f"--{flag}={path}", error) from None


# ---- what to know about it -----------------------------------------------------------------------


def notes(runs: list[Run]) -> list[str]:
    """Lines below the table: data, commits and machines, and what a run could not tell yet."""
    lines = [""]
    data = groups(runs, same_data)
    if len(data) == 1:
        recorded_most = max(runs, key=lambda run: len(run.dataset))
        lines.append(f"data: {recorded_most.data_name}")
    else:
        lines.append("other data, so their losses do not compare:")
        lines += [f"  {group[0].data_name}: {names}" for group, names in named(data)]
    for key, what in (
        ("commit", "other commits"),
        ("machine", "other machines, so their times do not compare"),
    ):
        known = [run for run in runs if run.facts.get(key)]
        told = groups(known, lambda one, other, key=key: one.facts[key] == other.facts[key])
        if len(told) > 1:
            lines.append(f"{what}:")
            lines += [f"  {group[0].facts[key]}: {names}" for group, names in named(told)]
    if untold := [run.name for run in runs if not run.facts]:
        lines.append(f"data, commit and machine were not recorded by {', '.join(untold)}")
    for run in runs:
        if run.evaluations or run.best:
            continue
        last = run.last_loss
        seen = f": the batch of iteration {last[1]:,} had a loss of {last[0]:.4f}" if last else ""
        lines.append(f"no evaluation yet in {run.name}{seen}")
    return lines


def named(found):
    """(group, the names of its runs) of each group, the largest last, as the others if many."""
    *small, largest = sorted(found, key=len)
    listed = [(group, ", ".join(run.name for run in group)) for group in (*small, largest)]
    return [*listed[:-1], (largest, "the others")] if len(largest) > 3 else listed


if __name__ == "__main__":
    exit_cleanly(main)
