"""The measuring scripts at a size that a processor manages: what they write, and their errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import arguments

from experiments.optimizers import learning_curves
from experiments.optimizers.optimizer_memory import run_case
from experiments.optimizers.time_to_loss import evaluations, median, reached
from experiments.report.optimizer_plots import learning_curves_figure
from experiments.shared.common import read_csv
from leangpt.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def run(script, *flags):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{script}", *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )


@pytest.mark.slow
def test_memory_of_one_case_adds_up():
    row = run_case("tiny", "adam", "float32", False, 16, False, "cpu")
    assert row["fits"] and row["loss_last"] < row["loss_first"]
    assert row["bytes_per_parameter"] == pytest.approx(16, abs=0.01)
    assert row["peak_bytes"] > 16 * row["parameters"]
    small = run_case("tiny", "adamsn8", "bfloat16", True, 16, True, "cpu")
    assert small["gradient_bytes"] == 0 and small["bytes_per_parameter"] < 3.2


@pytest.mark.slow
def test_speed_writes_a_row_a_variant_and_keeps_other_devices(tmp_path):
    out = tmp_path / "speed.csv"
    for shape, variants in (("seed", "adamsn"), ("seed", "adamsn,adafactor")):
        done = run(
            "optimizers.optimizer_speed",
            f"--shape={shape}",
            f"--variants={variants}",
            "--rounds=1",
            "--device=cpu",
            "--threads=1",
            f"--out={out}",
        )
        assert done.returncode == 0, done.stderr
    rows = read_csv(out)
    assert [row["variant"] for row in rows] == ["adamsn", "adafactor"]
    assert all(row["step_ms"] > 0 and row["state_bytes"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flag, message",
    [
        ("optimizers.optimizer_speed", "--shape=huge", "unknown shape 'huge'"),
        ("optimizers.optimizer_memory", "--part=half", "unknown part 'half'"),
        ("optimizers.optimizer_quality", "--variants=adamsm", "unknown variant 'adamsm'"),
        ("search.muonsn_search", "--recipes=soup", "unknown recipe 'soup'"),
        ("optimizers.time_to_loss", "--rounds=0", "rounds must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(script, flag, message):
    reads = script in ("optimizers.optimizer_quality", "search.muonsn_search")
    done = run(script, flag, *[f"--input={ROOT / 'LICENSE'}"] * reads)  # any text will do
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_time_is_read_off_the_metrics(tmp_path):
    assert evaluations(tmp_path) == []
    (tmp_path / "metrics.csv").write_text(
        "iter,val_loss,seconds\n0,4.2,0\n10,,1\n20,1.9,2\n40,1.8,4\n60,1.7"
    )  # one half written
    rows = evaluations(tmp_path)
    assert [row["iter"] for row in rows] == ["0", "20", "40"]
    assert reached(rows, 1.8857)["seconds"] == "4" and reached(rows, 1.0) is None
    assert median([3.0, 1.0, 2.0]) == 2.0


@pytest.mark.slow
def test_a_curve_is_what_train_py_evaluated(tmp_path):
    tiny = arguments(tmp_path, "unused", "--max_iters=4", "--lr_decay_iters=4")
    settings = learning_curves.Settings(options=" ".join(tiny), eval_interval=2, threads=1)
    rows = learning_curves.curve(settings, "adamsn8")
    assert [row["iteration"] for row in rows] == [0, 2, 4]
    assert all(row["variant"] == "adamsn8" and 1 < row["val_loss"] < 5 for row in rows)
    settings.options = "--nonsense=1"
    with pytest.raises(UserError, match="status 2.*nonsense"):
        learning_curves.curve(settings, "adamsn8")


def test_a_line_is_drawn_for_each_curve():
    rows = [
        dict(variant=variant, iteration=iteration, val_loss=4 - iteration / 100)
        for variant in ("adam", "muonsn8")
        for iteration in (0, 100, 200)
    ]
    (axis,) = learning_curves_figure(rows).axes
    assert [len(line.get_xdata()) for line in axis.lines] == [2, 2]  # not the untrained model's
    assert axis.lines[0].get_label() == "adam, ends at 2.000"


@pytest.mark.slow
@pytest.mark.campaign
def test_ways_of_accumulation_are_paired(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "accumulation.csv"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    flags = [f"--input={text}", f"--out={out}", "--iterations=6", "--variants=adamsn8"]
    done = run("optimizers.accumulation", *flags, "--seeds=1", "--ways=float32,float32_8")
    assert done.returncode == 0, done.stderr
    done = run("optimizers.accumulation", *flags, "--seeds=2")
    assert done.returncode == 0, done.stderr
    rows = read_csv(out)
    assert len(rows) == 12 and len({(row["way"], row["seed"]) for row in rows}) == 12
    assert [row["sum_bytes"] for row in rows[2:6]] == [0.5625, 2, 1.0625, 0.5625]
    line = next(line for line in done.stdout.splitlines() if "float32_8" in line)
    assert "2 seeds" in line and "to float32" in line and "4 + 1.0625 + 1." in line
