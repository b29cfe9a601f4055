"""Optimizers at 124M parameters on fresh tokens: every run of the comparison, one row each.

    python data/source_code/prepare.py
    python -m experiments.scale.optimizers_124m --stage=tune --gpus=4 --minutes=60
    python -m experiments.scale.optimizers_124m --stage=final --gpus=4 --entrants=adam,muonsn8

Runs are train.py as a user starts it (foreign.py for optimizers of others), one on each GPU; what
is in results/optimizers_124m.csv is not made again. docs/results/optimizers_124m_protocol.md says
what is held fixed. Each run's log and metrics.csv stay under --out_dir, its weights do not. To
leave it alone: `setsid nohup python ... > log 2>&1 &`; a row is written as soon as a run ends.
"""

import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from configurator import parse_config
from experiments.scale import run_queue
from experiments.scale.entrants import ENTRANTS
from experiments.scale.plan import NAMES, finals, loss_of, run_of, tuning
from experiments.shared.common import RESULTS, ROOT, read_csv, write_csv
from leangpt.system.errors import UserError, exit_cleanly

STAGES = ("tune", "final")
PROTOCOL = (
    "--n_layer=12", "--n_head=12", "--n_embd=768", "--block_size=1024", "--data_order=once",
    "--lr_schedule=linear", "--min_lr=0", "--eval_interval=0", "--eval_iters=0",
    "--grad_clip=1.0", "--dropout=0.0",
)  # fmt: skip
LONGEST_WARMUP = 250  # iterations
SCHEDULE = ("tune_iterations", "final_iterations", "warmup")  # settings that are held fixed too
TINY = (
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=4",
    "--gradient_accumulation_steps=1",
    "--device=cpu",
    "--compile=False",
)
WEIGHTS = ("ckpt.pt", "ckpt_last.pt")


@dataclass
class Settings:
    """Make the runs of the comparison that are not in its table yet."""

    stage: str = "tune"  # tune: short runs over rates | final: the best at full length
    entrants: str = ""  # names with commas between, first things first; "": all of them
    tune_iterations: int = 400  # of a run that searches rates
    final_iterations: int = 4000  # of one at full length
    warmup: float = 0.1  # part of the iterations, up to 250
    seeds: int = 3  # of the best setting of an entrant, in finals
    early: bool = False  # finals also of entrants whose tuning is not finished
    gpus: int = 1  # runs at a time, one a GPU
    minutes: float | None = None  # start no run that would end later than this
    dataset: str = "source_code"  # prepared by data/source_code/prepare.py
    data_dir: str = str(ROOT / "data")  # the folder of data sets
    out_dir: str = "out-124m"  # logs, metrics and the cache of compiled kernels
    results: str = str(RESULTS / "optimizers_124m.csv")  # the table
    max_runs: int | None = None  # stop after so many
    rehearse: int | None = None  # one run of so many iterations each: does everything work here?
    tiny: bool = False  # a small model on the CPU for a few iterations: does this script work?
    dry_run: bool = False  # print what would be run now, and run nothing

    def __post_init__(self):
        if self.stage not in STAGES:
            raise UserError(f"--stage={self.stage}: choose from {', '.join(STAGES)}")
        for name in self.names:
            if name not in ENTRANTS:
                raise UserError(f"unknown entrant {name!r}; choose from: {', '.join(ENTRANTS)}")
        for name in ("gpus", "seeds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def names(self):
        """The entrants asked for, in order."""
        return [name for name in self.entrants.split(",") if name] or list(ENTRANTS)

    @property
    def max_iters(self):
        """Iterations of a run."""
        stages = {"tune": self.tune_iterations, "final": self.final_iterations}
        return self.rehearse or (6 if self.tiny else stages[self.stage])


def main(argv=None):
    settings, _ = parse_config(Settings, argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the queue stops its runs
    Comparison(settings).run()


class Comparison:
    """The table, what is missing in it, and the runs that fill it."""

    def __init__(self, settings):
        self.settings = settings
        self.table = Path(settings.results)
        self.out = Path(settings.out_dir)
        self.began = time.monotonic()
        self.made = 0
        self.broken = {name for name in settings.names if lacks_package(name)}  # left out
        self.wall = []  # seconds of runs made here
        meta = self._meta()
        files = meta.get("files", {})
        self.data_sha256 = files.get("val.bin", {}).get("sha256") or str(meta.get("sha256"))
        everything = [PROTOCOL, settings.tiny and TINY, settings.rehearse, self.data_sha256]
        default = Settings()  # another schedule is another protocol
        everything += [
            f"{name}={getattr(settings, name)}"
            for name in SCHEDULE
            if getattr(settings, name) != getattr(default, name)
        ]
        self.protocol = hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:8]
        self.rows = read_csv(self.table) if self.table.is_file() else []

    def _meta(self):
        path = Path(self.settings.data_dir) / self.settings.dataset / "meta.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path.parent} is not prepared: run  python data/source_code/prepare.py"
            ) from error

    def mine(self):
        """The rows of this protocol."""
        return [row for row in self.rows if str(row["protocol"]) == self.protocol]

    def run(self):
        """Make the runs there is time for; print the table."""
        if self.settings.dry_run:
            for name in self.settings.names:
                for run in self.wanted(name):
                    print(" ".join(self.command(run)[1:]))
            return
        say(f"protocol {self.protocol}: {len(self.mine())} rows are there")
        run_queue.work(
            self.settings.gpus,
            self.next_run,
            self.launch,
            self.finished,
            say,
            poll=0.05 if self.settings.tiny else 0.5,
        )
        say(summary(self.mine(), self.settings.stage))
        if self.broken:
            say(
                "left out, for a package that is missing or a run that failed: "
                + ", ".join(sorted(self.broken))
            )
            sys.exit(1)

    # ---------------------------------------------------------------- what is next

    def wanted(self, name):
        """An entrant's runs that can be made now."""
        if self.settings.rehearse and any(row["entrant"] == name for row in self.mine()):
            return []
        if self.settings.rehearse:
            return tuning(name, [])[:1]
        if self.settings.stage == "tune":
            return tuning(name, self.mine())
        return finals(name, self.mine(), self.settings.seeds, self.settings.early)

    def next_run(self, running):
        """The first run that is wanted and not under way, if there is time for it."""
        if (
            self.settings.max_runs is not None
            and self.made + len(running) >= self.settings.max_runs
        ):
            return None
        if self.settings.minutes is not None:
            left = 60 * self.settings.minutes - (time.monotonic() - self.began)
            if left < max(self.wall[-2 * self.settings.gpus :], default=0.0):
                return None
        names = [name for name in self.settings.names if name not in self.broken]
        if self.settings.stage == "final":  # by turns: the best of each comes first
            made = [run_of(row) for row in self.mine() if row["stage"] == "final"]
            names.sort(key=lambda name: sum(run.entrant == name for run in [*made, *running]))
        for name in names:
            for run in self.wanted(name):
                if run not in running:
                    return run
        return None

    # ---------------------------------------------------------------- one run

    def command(self, run):
        """Its command line."""
        entrant, iterations = ENTRANTS[run.entrant], self.settings.max_iters
        script = ["train.py", f"--optimizer_variant={entrant.variant}"]
        if entrant.foreign:
            script = ["-m", "experiments.scale.foreign", entrant.variant]
        warmup = min(LONGEST_WARMUP, math.ceil(self.settings.warmup * iterations))
        flags = [*PROTOCOL, *entrant.flags, *(TINY if self.settings.tiny else ())]
        return [
            sys.executable,
            *script,
            *flags,
            f"--dataset={self.settings.dataset}",
            f"--data_dir={Path(self.settings.data_dir).resolve()}",
            f"--out_dir={self.folder(run)}",
            f"--max_iters={iterations}",
            f"--warmup_iters={warmup}",
            f"--seed={run.seed}",
            f"--log_interval={min(20, math.ceil(iterations / 4))}",
            f"--learning_rate={run.learning_rate:g}",
            f"--embedding_lr={run.embedding_lr:g}",
            f"--weight_decay={run.weight_decay:g}",
            f"--beta2={run.beta2:g}",
        ]

    def folder(self, run):
        """Where its files go."""
        name = "-".join(
            f"{getattr(run, name):g}"
            if isinstance(getattr(run, name), float)
            else str(getattr(run, name))
            for name in NAMES
        )
        return (self.out / self.protocol / name).resolve()

    def launch(self, run, slot):
        """Start it -> Job."""
        say(f"{self.clock()} start {described(run)} on {slot}")
        env = run_queue.environment(slot, not self.settings.tiny, self.out.resolve() / "cache")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        command = self.command(run)
        if command[1] != "-m":
            command[1] = str(ROOT / command[1])
        return run_queue.start(run, slot, command, self.folder(run) / "log.txt", env)

    def finished(self, job, status):
        """Write its row. A run that failed as no optimizer fails takes its entrant out."""
        folder = self.folder(job.run)
        for name in WEIGHTS:
            (folder / name).unlink(missing_ok=True)
        text = (folder / "log.txt").read_text(errors="replace")
        last = (text.strip().splitlines() or ["it said nothing"])[-1]
        self.made += 1
        if status not in (0, 1) or status == 1 and not last.startswith("error: "):
            self.broken.add(job.run.entrant)
            say(
                f"{self.clock()} FAILED {described(job.run)} with status {status}: {last}; "
                f"no row is written, see {folder / 'log.txt'}"
            )
            return
        self.wall.append(job.seconds)
        whole = self.settings.max_iters if status == 0 else None
        row = {
            "protocol": self.protocol,
            **asdict(job.run),
            **measured(folder, text, whole),
            "wall_seconds": round(job.seconds, 1),
            "outcome": "" if status == 0 else outcome(last),
            "data": self.data_sha256[:12],
            **machine(self.settings.tiny),
        }
        self.rows = [*(read_csv(self.table) if self.table.is_file() else []), row]
        write_csv(self.table, self.rows)
        say(
            f"{self.clock()} done  {described(job.run)}: val loss {row['val_loss']}, "
            f"{row['tokens_per_s']} tokens/s, {row['peak_gb']} GB, {job.seconds:.0f} s "
            f"{row['outcome']}"
        )

    def clock(self):
        """Minutes since the start, as text."""
        return f"[{(time.monotonic() - self.began) / 60:6.1f} min]"


def lacks_package(name):
    """Is the package that an entrant comes from not installed here?"""
    package = ENTRANTS[name].package
    return package is not None and importlib.util.find_spec(package) is None


def say(text):
    """A line of the log, at once."""
    print(text, flush=True)


def described(run):
    """A run in a few words."""
    return (
        f"{run.entrant} lr {run.learning_rate:g} / {run.embedding_lr:g}, decay "
        f"{run.weight_decay:g}, beta2 {run.beta2:g}, seed {run.seed} ({run.stage})"
    )


def outcome(line):
    """Why a run ended early, in a word or two of its last line."""
    return "out of memory" if "out of memory" in line else "diverged" if "finite" in line else line


def measured(folder, text, iterations):
    """The measured columns of a run, from its metrics.csv and the text it printed.

    iterations: how many it made, after which it was evaluated; None where it stopped before.
    """
    rows = read_csv(folder / "metrics.csv") if (folder / "metrics.csv").is_file() else []
    steps = [row for row in rows if row["loss"] is not None]
    ends = [row for row in rows if row["val_loss"] is not None and row["iter"] == iterations]
    assert ends or iterations is None, f"{folder}: no evaluation after {iterations} iterations"
    later = steps[1:] or steps  # the first one compiles
    peaks = [row["peak_mb"] for row in steps if row["peak_mb"] is not None]
    total = re.search(r"^ +total +\d+ +([\d,]+) +([\d,]+) ", text, re.MULTILINE)
    parameters, state = (
        (int(number.replace(",", "")) for number in total.groups()) if total else (None, None)
    )
    said = re.findall(r"^state bytes (\d+)$", text, re.MULTILINE)
    state = int(said[-1]) if said else state
    end = ends[-1] if ends else {"val_loss": None, "train_loss": None}

    def middle(column):
        return round(statistics.median(row[column] for row in later)) if later else None

    return {
        "val_loss": end["val_loss"], "train_loss": end["train_loss"],
        "iterations": rows[-1]["iter"] if rows else 0, "tokens": rows[-1]["tokens"] if rows else 0,
        "train_seconds": rows[-1]["seconds"] if rows else None,
        "iteration_ms": middle("ms"), "tokens_per_s": middle("tokens_per_s"),
        "peak_gb": round(max(peaks) / 1000, 4) if peaks else None,
        "parameters": parameters, "state_bytes": state,
        "state_bytes_per_parameter": round(state / parameters, 3) if parameters else None,
    }  # fmt: skip


_machine = {}


def machine(tiny):
    """Columns on where a run was made."""
    if not _machine:
        from experiments.shared.common import provenance  # it loads torch: not before it is needed

        _machine.update(provenance("cpu" if tiny else "cuda"))
    return _machine


def summary(rows, stage):
    """A table as text: the best runs of each entrant at this stage, best entrant first."""
    found = {}
    for row in rows:
        if row["stage"] == stage:
            found.setdefault(row["entrant"], []).append(row)
    lines = [
        (
            "entrant",
            "runs",
            "val loss",
            "lr",
            "embedding",
            "decay",
            "beta2",
            "bytes/param",
            "tokens/s",
            "GB",
            "finished",
        )
    ]
    for name, mine in sorted(found.items(), key=lambda item: min(map(loss_of, item[1]))):
        best = min(mine, key=loss_of)
        run = run_of(best)
        done = "yes" if stage == "final" or not tuning(name, rows) else "no"
        lines.append(
            (
                name,
                str(len(mine)),
                f"{loss_of(best):.4f}",
                f"{run.learning_rate:g}",
                f"{run.embedding_lr:g}",
                f"{run.weight_decay:g}",
                f"{run.beta2:g}",
                str(best["state_bytes_per_parameter"]),
                str(best["tokens_per_s"]),
                str(best["peak_gb"]),
                done,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


if __name__ == "__main__":
    exit_cleanly(main)
