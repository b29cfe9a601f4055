"""README's two commands as a newcomer runs them: a fresh copy, no .venv -> results/two_commands.csv

    python -m experiments.shared.two_commands                 make demo, then make test: ten minutes
    python -m experiments.shared.two_commands --commands=demo   one of them; the other's row stays

The time is of the whole command: packages installed, data fetched, model trained. Nothing else
should run meanwhile.
"""

import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from configurator import parse_config
from experiments.shared.common import RESULTS, ROOT, provenance, read_csv, write_csv
from leangpt.system.errors import UserError, exit_cleanly

COMMANDS = ("demo", "test")
# Of the demo's lines the README shows these, the last evaluation, and the sample's beginning.
STARTS = (
    "text: ",
    "  because ",
    "device ",
    "model ",
    "attention ",
    "memory ",
    "step 0:",
    "iter 100:",
)
SAMPLE_LINES = 3


@dataclass
class Settings:
    commands: tuple[str, ...] = COMMANDS  # make targets to run, in this order
    out: str = str(RESULTS / "two_commands.csv")  # where the rows go


def fresh_copy(folder):
    """The files git tracks, as they are now, in `folder`."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, text=True, capture_output=True
    ).stdout.split("\0")
    for name in filter(None, names):
        target = Path(folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)


def shorten_demo(output):
    """(the lines of `make demo` that the README shows, its seconds of training)."""
    lines = output.splitlines()
    shown = [line for line in lines if line.startswith(STARTS)]
    shown.append([line for line in lines if line.startswith("step ")][-1])
    (begin,) = (i for i, line in enumerate(lines) if line.startswith("model: "))
    (speed,) = (line for line in lines if " tokens/s, " in line)
    shown += [line for line in lines[begin + 1 :] if line.strip()][:SAMPLE_LINES] + [speed]
    return "\n".join(shown), float(
        re.search(r"^done: .* ([\d.]+) s of training", output, re.MULTILINE).group(1)
    )


def measure(command):
    """Run `make COMMAND` in a fresh copy -> its row."""
    with tempfile.TemporaryDirectory() as folder:
        fresh_copy(folder)
        began = time.perf_counter()
        done = subprocess.run(
            ["make", "--no-print-directory", command],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        seconds = time.perf_counter() - began
    if done.returncode:
        print(done.stdout)
        raise UserError(f"make {command} ended with status {done.returncode}, see above")
    shown, training = done.stdout.strip().splitlines()[-1], ""
    if command == "demo":
        shown, training = shorten_demo(done.stdout)
    return {
        "command": command,
        "seconds": round(seconds, 1),
        "training_seconds": training,
        "shown": shown,
        **provenance(),
    }


def main():
    settings, _ = parse_config(Settings)
    unknown = set(settings.commands) - set(COMMANDS)
    if unknown:
        raise UserError(f"unknown command {unknown.pop()!r}; choose from: {', '.join(COMMANDS)}")
    out = Path(settings.out)
    rows = {
        row["command"]: {name: "" if value is None else value for name, value in row.items()}
        for row in (read_csv(out) if out.exists() else [])
    }
    for command in settings.commands:
        rows[command] = measure(command)
        print(f"make {command}: {rows[command]['seconds']} s\n{rows[command]['shown']}", flush=True)
    # not sooner: `make test` compares the README with what its copy has of the CSV
    write_csv(out, [rows[name] for name in COMMANDS if name in rows])


if __name__ == "__main__":
    exit_cleanly(main)
