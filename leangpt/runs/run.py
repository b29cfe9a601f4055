"""A run's folder, written and read: what `compare.py` knows of a run.

    config.json   its settings
    run.json      facts that no setting tells: parameters, bytes of optimizer state, data, commit
    metrics.csv   a row a report and a row an evaluation (log.py)
    ckpt.pt       the best model so far, also all that nanoGPT leaves behind

Any of them may be missing or about to be written: a run can be read while it goes on.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from leangpt.memory.meter import tensor_bytes
from leangpt.optim.base import check_layout
from leangpt.parallel.failures import launch
from leangpt.runs.checkpoint import BEST, checkpoint_to_resume, load_checkpoint
from leangpt.system.errors import UserError, refused
from leangpt.system.timing import commit_id, describe_machine
from leangpt.system.whole_files import written_whole

CONFIG, FACTS, METRICS = "config.json", "run.json", "metrics.csv"
NEEDED = ("iter", "loss", "val_loss", "seconds")  # columns without which a CSV is no run's
# Two runs had the same data if all of these agree that both of them know.
SETTING_TYPES = {"max_iters": int, "dataset": str, "optimizer_variant": str}
FACT_TYPES = {"parameters": int, "state_bytes": int, "dataset": dict}
FACT_TYPES |= {"machine": str, "torch": str, "commit": str}
DATASET_TYPES = {"name": str, "sha256": str, "tokenizer": str, "source": str}
DATASET_TYPES |= {"vocab_size": int, "train_tokens": int, "val_tokens": int}
SAME_DATA = ("sha256", "tokenizer", "vocab_size", "train_tokens", "val_tokens")


# ---- written once, by the run itself -------------------------------------------------------------


def run_facts(model: torch.nn.Module, state_bytes: int, dataset, runtime) -> dict[str, Any]:
    """What a run should leave beside its settings, as plain values for `write_facts`.

    state_bytes: of the optimizer once it has made a step. dataset: a text.dataset.Dataset.
    runtime: a system.runtime.Runtime. The commit is '' where the code is in no git repository.
    """
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": state_bytes,
        "dataset": {
            "name": dataset.name,
            "sha256": dataset.sha256,
            "tokenizer": dataset.meta.get("tokenizer"),
            "vocab_size": dataset.vocab_size,
            "train_tokens": len(dataset.train),
            "val_tokens": len(dataset.val),
            "source": dataset.source,
        },
        "machine": describe_machine(runtime.device),
        "processes": runtime.world_size,
        "launch": launch(),
        "torch": torch.__version__,
        "commit": commit_id(),
    }


def write_facts(folder: str | Path, facts: dict[str, Any]) -> None:
    """Write folder/run.json, whole or not at all. Raises UserError where that fails."""
    write_json(Path(folder) / FACTS, facts)


def write_json(path: str | Path, values: dict[str, Any]) -> None:
    """Write a dict of plain values, whole or not at all. Raises UserError where that fails."""
    with written_whole(path, fsync=True) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# ---- read by anyone ------------------------------------------------------------------------------


@dataclass
class Run:
    """One run as its folder tells it; what the folder does not tell is None or empty."""

    name: str  # the folder, as it was given
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float | None]] = field(default_factory=list)  # of metrics.csv
    saved: dict[str, Any] = field(default_factory=dict)  # of a checkpoint, where that is needed

    @property
    def evaluations(self) -> list[tuple[int, float, float]]:
        """(iteration, seconds of training, validation loss) of each evaluation, in order."""
        return [
            (int(row["iter"]), row["seconds"], row["val_loss"])
            for row in self.rows
            if row["val_loss"] is not None
        ]

    @property
    def iteration(self) -> int:
        """Iterations done so far, as far as the log tells."""
        # a report follows its iteration, an evaluation precedes it
        done = [int(row["iter"]) + (row["val_loss"] is None) for row in self.rows]
        return max([*done, self.saved.get("iteration", 0)])

    @property
    def final(self) -> float | None:
        """The last validation loss."""
        return self.evaluations[-1][2] if self.evaluations else None

    @property
    def best(self) -> tuple[float, int] | None:
        """The lowest validation loss and its iteration."""
        found = [(loss, at) for at, _, loss in self.evaluations if math.isfinite(loss)]
        if not self.evaluations and math.isfinite(self.saved.get("best_val_loss", math.inf)):
            found = [(self.saved["best_val_loss"], self.saved["iteration"])]
        return min(found, default=None)

    @property
    def last_loss(self) -> tuple[float, int] | None:
        """The last batch's training loss that was logged, and its iteration."""
        found = [(row["loss"], int(row["iter"])) for row in self.rows if row["loss"] is not None]
        return found[-1] if found else None

    @property
    def seconds(self) -> float | None:
        """Seconds spent training, without evaluations and saves."""
        return self.rows[-1]["seconds"] if self.rows else self.saved.get("seconds")

    @property
    def tokens_per_s(self) -> float | None:
        """The median of what was logged; the first, with its warm-up, counts if it is alone."""
        rates = self._column("tokens_per_s")
        return statistics.median(rates[1:] or rates) if rates else None

    @property
    def top_rate(self) -> float | None:
        """The highest learning rate of linear weights so far."""
        return max(self._column("lr"), default=None)

    @property
    def peak_bytes(self) -> int | None:
        """The allocator's exact peak. Runs older than run.json logged the resident set instead."""
        peaks = self._column("peak_mb") if self.facts else []
        return round(1e6 * peaks[-1]) if peaks else None

    @property
    def state_bytes(self) -> int | None:
        """Bytes of optimizer state."""
        return self.facts.get("state_bytes", self.saved.get("state_bytes"))

    @property
    def parameters(self) -> int | None:
        """Numbers that the model consists of, tied ones counted once."""
        return self.facts.get("parameters", self.saved.get("parameters"))

    @property
    def dataset(self) -> dict[str, Any]:
        """What is known of the data: `name`, and those of SAME_DATA that were recorded."""
        found = self.facts.get("dataset") or self.saved.get("dataset") or {}
        return {"name": self.settings.get("dataset"), **found}

    @property
    def data_name(self) -> str:
        """The data in a few words: name, tokenizer, the first digits of the text's sha256."""
        known = self.dataset
        parts = [known.get("tokenizer") and f"{known['tokenizer']} tokens"]
        parts.append(known.get("sha256") and f"sha256 {known['sha256'][:12]}")
        more = ", ".join(part for part in parts if part)
        return (known["name"] or "unknown data") + (f" ({more})" if more else "")

    def _column(self, name):
        return [row[name] for row in self.rows if row.get(name) is not None]


def read_run(folder: str | Path) -> Run | None:
    """The run in `folder`, or None if there is none: neither a metrics.csv nor a checkpoint.

    Raises UserError, naming file and line, for a file that is damaged. A last line of metrics.csv
    that is still being written is left for the next reading.
    """
    name, folder = str(folder), Path(folder)
    checkpoint = checkpoint_to_resume(folder)
    if not (folder / METRICS).is_file() and not checkpoint.is_file():
        return None
    settings = _read_json(folder / CONFIG, SETTING_TYPES)
    run = Run(name, settings, _read_json(folder / FACTS, FACT_TYPES))
    if run.facts.get("dataset"):
        _check_types(run.facts["dataset"], DATASET_TYPES, folder / FACTS)
    if (folder / METRICS).is_file():
        run.rows = read_metrics(folder / METRICS)
    if checkpoint.is_file() and not (run.rows and run.facts and run.settings):
        best = folder / BEST  # of a run that tells nothing else, its best is what is asked for
        run.saved, settings = _read_checkpoint(best if best.is_file() else checkpoint)
        run.settings = run.settings or settings
    return run


def read_metrics(path: str | Path) -> list[dict[str, float | None]]:
    """The rows of a metrics.csv as numbers, None for an empty cell.

    Raises UserError, naming the line, for what no run writes.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = text.split("\n")[:-1]  # what follows the last newline is still being written
    if not lines:
        return []
    columns = lines[0].split(",")
    if missing := [name for name in NEEDED if name not in columns]:
        raise UserError(f"{path} is damaged or no run's: it lacks the columns {', '.join(missing)}")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        cells = line.split(",")
        try:
            if len(cells) != len(columns):
                raise ValueError(f"{len(cells)} cells where the header has {len(columns)}")
            row = {name: float(cell) if cell else None for name, cell in zip(columns, cells)}
            if row["iter"] is None or row["seconds"] is None or row["iter"] % 1:
                raise ValueError("no iteration or no seconds")
        except ValueError as error:
            raise UserError(f"{path} is damaged in line {number}: {error}") from None
        rows.append(row)
    return rows


def _read_json(path, types):
    """The dict in a JSON file, {} where there is no such file; `types` as for _check_types."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no settings")
    _check_types(values, types, path)
    return values


def _check_types(values, types, path):
    """Raise UserError for a value that is there, not None, and of another type than `types` has."""
    for name, kind in types.items():
        value = values.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"{path} is damaged: {name} is {value!r:.50}, no {kind.__name__}")


def _read_checkpoint(path):
    """(what a checkpoint tells about its run, its settings), ours or nanoGPT's."""
    checkpoint = load_checkpoint(path, mmap=True)  # it may be larger than this machine's memory
    state = []
    if saved := checkpoint.get("optimizer"):
        check_layout(saved)
        entries = saved["state"].values()
        state = [v for entry in entries for v in entry.values() if torch.is_tensor(v)]
    weights = {tensor.data_ptr(): tensor.numel() for tensor in checkpoint["model"].values()}
    facts = {
        "iteration": int(checkpoint["iter_num"]),
        "best_val_loss": checkpoint["best_val_loss"],
        "seconds": checkpoint.get("train_seconds"),
        "parameters": sum(weights.values()),
        "state_bytes": tensor_bytes(state) or None,  # none yet before the first step
        "dataset": checkpoint.get("dataset"),
    }
    settings = checkpoint.get("config") or {}
    _check_types(settings, SETTING_TYPES, path)
    _check_types(facts["dataset"] or {}, DATASET_TYPES, path)
    return facts, settings


# ---- what several runs have in common ------------------------------------------------------------


def settings_that_differ(runs: list[Run]) -> list[str]:
    """Names of the settings that two of the runs have different values for, in their order.

    A setting that one run does not know, being older or nanoGPT's, is no difference by itself.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    for name in ("out_dir", "overwrite", "wandb_run_name"):  # they change nothing in a run
        names.pop(name, None)
    values = {name: [run.settings[name] for run in runs if name in run.settings] for name in names}
    return [name for name in names if any(value != values[name][0] for value in values[name])]


def differences(runs: list[Run]) -> list[str]:
    """'name=value, ...' of each run: what it knows of the settings that differ."""
    names = settings_that_differ(runs)
    return [
        ", ".join(f"{name}={run.settings[name]}" for name in names if name in run.settings)
        for run in runs
    ]


def same_data(one: Run, other: Run) -> bool:
    """Did both train and validate on the same tokens, as far as it was recorded?"""
    known = [
        key
        for key in SAME_DATA
        if one.dataset.get(key) is not None and other.dataset.get(key) is not None
    ]
    if "sha256" not in known and one.dataset["name"] != other.dataset["name"]:
        return False
    return all(one.dataset[key] == other.dataset[key] for key in known)


def groups(runs: list[Run], alike) -> list[list[Run]]:
    """The runs in groups, each alike its group's first: `alike(run, run)` -> bool."""
    found: list[list[Run]] = []
    for run in runs:
        for group in found:
            if alike(group[0], run):
                group.append(run)
                break
        else:
            found.append([run])
    return found
