"""The comparison at 124M: what is run next, the queue, and a tiny comparison from end to end."""

import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from tiny_run import ROOT, make_dataset, run_script

from experiments.scale import run_queue
from experiments.scale.entrants import ENTRANTS
from experiments.scale.optimizers_124m import Comparison, Settings, measured, outcome, summary
from experiments.scale.plan import Run, finals, neighbours, run_of, tuning
from experiments.shared.common import read_csv
from leangpt.system.errors import UserError

SCRIPT = "-m", "experiments.scale.optimizers_124m"


def rows_of(runs, loss):
    return [
        asdict(run)
        | {"val_loss": loss(run), "state_bytes_per_parameter": 8, "tokens_per_s": 1, "peak_gb": 2}
        for run in runs
    ]


def tuned(entrant, loss, limit=60):
    """Rows of a whole tuning, made one run at a time."""
    rows = []
    while (missing := tuning(entrant, rows)) and len(rows) < limit:
        rows += rows_of(missing[:1], loss)
    return rows


# ---- what is next -------------------------------------------------------------------------------


def bowl(rate, embedding):
    """A loss whose best lies at these rates; a little less with beta2 0.99."""

    def loss(run):
        off = abs(run.learning_rate / rate - 1) + abs(run.embedding_lr / embedding - 1)
        return 1 + off - 0.1 * (run.beta2 == 0.99) + 0.1 * (run.weight_decay != 0.1)

    return loss


def test_the_grid_comes_first_and_its_middle_before_its_edges():
    wanted = tuning("adam", [])
    assert len(wanted) == 8 and wanted == list(dict.fromkeys(wanted))
    assert [run.learning_rate for run in wanted[::2]] == [1e-3, 2e-3, 5e-4, 4e-3]
    assert {run.embedding_lr for run in wanted} == {1e-3, 4e-3}
    assert tuning("adam", rows_of(wanted[:3], lambda run: 1)) == wanted[3:]


@pytest.mark.parametrize("rate, embedding", [(2e-3, 2e-3), (1.6e-2, 1.6e-2), (2.5e-4, 1e-3)])
def test_the_search_goes_on_until_the_best_is_inside(rate, embedding):
    rows = tuned("adam", bowl(rate, embedding))
    runs = [run_of(row) for row in rows]
    best = min(rows, key=lambda row: row["val_loss"])
    assert (best["learning_rate"], best["embedding_lr"]) == (rate, embedding)
    assert best["beta2"] == 0.99 and len(runs) == len(set(runs)) < 30
    inside = replace(run_of(best), beta2=0.95)
    assert set(neighbours(inside)) < set(runs)
    assert sum(run.weight_decay != 0.1 for run in runs) == 1


def test_a_diverged_run_is_never_the_best_and_never_repeated():
    def loss(run):
        return None if run.learning_rate > 1e-3 else bowl(2e-3, 2e-3)(run)

    rows = tuned("adam", loss)
    assert len(rows) == len({run_of(row) for row in rows}) < 30
    assert finals("adam", rows, 3)[0].learning_rate == 1e-3
    nowhere = rows_of(tuning("adam", []), lambda run: None)
    assert tuning("adam", nowhere) == [] and finals("adam", nowhere, 3) == []


def test_rows_of_others_do_not_count():
    rows = tuned("adam", bowl(2e-3, 2e-3))
    assert len(tuning("muonsn8", rows)) == 8
    assert finals("muonsn8", rows, 3) == []


def test_finals_are_the_best_three_then_seeds_of_the_best():
    rows = tuned("adam", bowl(2e-3, 2e-3))
    assert finals("adam", rows[:-1], 3) == []  # still tuning
    assert len(finals("adam", rows[:-1], 3, early=True)) == 3
    three = finals("adam", rows, 3)
    by_loss = sorted(rows, key=lambda row: row["val_loss"])[:3]
    assert three == [replace(run_of(row), stage="final") for row in by_loss]
    rows += rows_of(three, lambda run: 0.5 if run == three[1] else 0.7)
    assert finals("adam", rows, 3) == [replace(three[1], seed=2), replace(three[1], seed=3)]
    rows += rows_of(finals("adam", rows, 3), lambda run: 0.4)
    assert finals("adam", rows, 3) == []
    assert "adam" in summary(rows, "final") and "0.4000" in summary(rows, "final")


# ---- the queue ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_queue_keeps_every_slot_busy_and_reports_each_end(tmp_path):
    waiting, running_at_once, ends = list(range(5)), [], []

    def launch(run, slot):
        command = [sys.executable, "-c", f"import time; time.sleep(0.2); raise SystemExit({run})"]
        return run_queue.start(run, slot, command, tmp_path / f"{run}" / "log.txt", None)

    def next_run(running):
        running_at_once.append(len(running))
        return waiting.pop(0) if waiting else None

    run_queue.work(
        2, next_run, launch, lambda job, status: ends.append((job.run, status)), print, poll=0.01
    )
    assert sorted(ends) == [(run, run) for run in range(5)]
    assert max(running_at_once) == 1  # asked only while one of two slots is free


def test_an_end_of_the_queue_ends_its_runs_and_says_so(tmp_path, capsys):
    jobs = []

    def launch(run, slot):
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        jobs.append(run_queue.start(run, slot, command, tmp_path / "log.txt", None))
        return jobs[-1]

    def next_run(running):
        if running:
            raise SystemExit(143)
        return "the run"

    began = time.monotonic()
    with pytest.raises(SystemExit):
        run_queue.work(2, next_run, launch, None, print)
    assert jobs[0].process.poll() is not None and time.monotonic() - began < 30
    assert "stopping the run after" in capsys.readouterr().out


def test_each_slot_has_its_gpu_and_all_share_a_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run_queue.environment(2, True, tmp_path)["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    one, two = (run_queue.environment(slot, True, tmp_path) for slot in (0, 1))
    assert (one["CUDA_VISIBLE_DEVICES"], two["CUDA_VISIBLE_DEVICES"]) == ("4", "6")
    assert one["TORCHINDUCTOR_CACHE_DIR"] == two["TORCHINDUCTOR_CACHE_DIR"]


# ---- from end to end ----------------------------------------------------------------------------


@pytest.fixture
def flags(tmp_path):
    make_dataset(tmp_path / "data")
    return [
        "--tiny=True",
        f"--data_dir={tmp_path / 'data'}",
        "--dataset=tiny",
        f"--out_dir={tmp_path / 'out'}",
        f"--results={tmp_path / 'rows.csv'}",
    ]


@pytest.mark.slow
def test_a_tiny_comparison(tmp_path, flags, monkeypatch):
    monkeypatch.setenv("LEANGPT_COMMIT", "1e23456")
    done = run_script(
        *SCRIPT, *flags, "--entrants=adam,muonsn8_low_byte", "--max_runs=1", "--gpus=2"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_script(
        *SCRIPT, *flags, "--entrants=muonsn8_low_byte,torch_muon", "--rehearse=4", "--gpus=2"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_csv(tmp_path / "rows.csv")
    assert [row["entrant"] for row in rows][0] == "adam"
    assert {row["entrant"] for row in rows[1:]} == {"muonsn8_low_byte", "torch_muon"}
    for row in rows:
        assert 2 < row["val_loss"] < 4 and row["outcome"] is None
        assert row["tokens"] == 64 * row["iterations"] and row["tokens_per_s"] > 0
        assert row["peak_gb"] > 0 and row["parameters"] == 6816 and row["commit"] == "1e23456"
    state = {row["entrant"]: row["state_bytes_per_parameter"] for row in rows}
    assert state["adam"] == pytest.approx(8, abs=0.02) and state["muonsn8_low_byte"] < 1.5
    assert state["torch_muon"] == pytest.approx(4 + 4 * 672 / 6816, abs=0.02)
    assert rows[0]["iterations"] == 6 and rows[1]["iterations"] == 4
    assert rows[0]["protocol"] != rows[1]["protocol"] == rows[2]["protocol"]
    left = [
        path.name
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and "cache" not in path.parts
    ]
    assert sorted(set(left)) == ["config.json", "log.txt", "metrics.csv", "run.json"]

    again = run_script(*SCRIPT, *flags, "--entrants=torch_muon", "--rehearse=4")
    assert "2 rows are there" in again.stdout and "start" not in again.stdout
    assert len(read_csv(tmp_path / "rows.csv")) == 3


def test_another_schedule_is_another_protocol(tmp_path, flags):
    given = {key[2:]: value for key, value in (flag.split("=") for flag in flags[1:])}
    one, same, other = (
        Comparison(Settings(**given, **more))
        for more in ({}, {"gpus": 4, "entrants": "adam"}, {"tune_iterations": 800, "warmup": 0.25})
    )
    assert one.protocol == same.protocol != other.protocol
    command = other.command(other.next_run([]))
    assert "--max_iters=800" in command and "--warmup_iters=200" in command


def test_entrants_take_turns_in_finals(flags):
    given = {key[2:]: value for key, value in (flag.split("=") for flag in flags[1:])}
    comparison = Comparison(Settings(**given, stage="final", entrants="adam,muonsn8"))
    comparison.rows = [
        row | {"protocol": comparison.protocol}
        for row in tuned("adam", bowl(2e-3, 2e-3)) + tuned("muonsn8", bowl(4e-3, 2e-3))
    ]
    running = []
    for _ in range(4):
        running.append(comparison.next_run(running))
    assert [run.entrant for run in running] == ["adam", "muonsn8", "adam", "muonsn8"]
    assert len(set(running)) == 4 and {run.stage for run in running} == {"final"}


def test_a_run_that_fails_takes_its_entrant_out_and_writes_no_row(tmp_path, flags, capsys):
    comparison = Comparison(
        Settings(
            **{key[2:]: value for key, value in (flag.split("=") for flag in flags[1:])},
            tiny=True,
            entrants="adam,muonsn8",
        )
    )
    run = comparison.next_run([])
    assert run.entrant == "adam" and comparison.next_run([run]).entrant == "adam"
    folder = comparison.folder(run)
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("Traceback\nKeyError: 'a bug'\n")
    comparison.finished(SimpleNamespace(run=run, seconds=1.0), 1)
    assert "FAILED adam" in capsys.readouterr().out and not comparison.table.exists()
    assert comparison.next_run([]).entrant == "muonsn8"
    (folder / "log.txt").write_text("error: the loss is not finite at iteration 3; ...\n")
    comparison.finished(SimpleNamespace(run=run, seconds=1.0), 1)
    (row,) = read_csv(comparison.table)
    assert row["outcome"] == "diverged" and row["val_loss"] is None
    assert outcome("error: out of memory: try a smaller batch") == "out of memory"


def test_no_run_is_started_that_would_end_too_late(flags):
    settings = Settings(
        **{key[2:]: value for key, value in (flag.split("=") for flag in flags[1:])},
        tiny=True,
        minutes=1.0,
    )
    comparison = Comparison(settings)
    assert comparison.next_run([]) is not None  # how long one takes is not known yet
    comparison.wall = [50.0]
    assert comparison.next_run([]) is not None
    comparison.wall = [70.0]
    assert comparison.next_run([]) is None


def test_measured_reads_the_last_evaluation(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "iter,tokens,loss,train_loss,val_loss,lr,grad_norm,tokens_per_s,ms,peak_mb,seconds\n"
        "0,0,4.0,,,1e-3,1.0,10,6400,50,6.4\n5,320,3.0,,,1e-3,1.0,640,100,900,6.9\n"
        "10,640,,2.5,2.6,,,,,,7.5\n"
    )
    text = "           total             15       6,816                  54,588    8.009  100%\n"
    row = measured(tmp_path, text, 10)
    assert row["val_loss"] == 2.6 and row["tokens_per_s"] == 640 and row["peak_gb"] == 0.9
    assert row["state_bytes"] == 54588 and row["train_seconds"] == 7.5
    assert measured(tmp_path, text + "state bytes 100\n", 10)["state_bytes"] == 100
    with pytest.raises(AssertionError, match="no evaluation after 12"):
        measured(tmp_path, text, 12)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--stage=tuned", "choose from tune, final"),
        ("--entrants=adma", "unknown entrant 'adma'"),
        ("--gpus=0", "gpus must be at least 1"),
        ("--data_dir=nowhere", "is not prepared: run"),
    ],
)
def test_wrong_input_is_one_line(flag, message):
    done = run_script(*SCRIPT, "--dry_run=True", flag)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_settings_of_the_comparison_are_train_pys():
    import train
    from configurator import parse_config

    comparison = Comparison.__new__(Comparison)
    comparison.settings, comparison.protocol = Settings(), "p"
    comparison.out = ROOT / "out"
    for name in ENTRANTS:
        run = Run("tune", name, 1e-3, 2e-3, 0.1, 0.95, 1)
        words = [word for word in comparison.command(run)[2:] if word.startswith("--")]
        settings, _ = parse_config(train.Settings, words)
        size = settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
        assert size == 131072 and settings.max_iters == 400 and settings.warmup_iters == 40
        assert (settings.learning_rate, settings.embedding_lr) == (1e-3, 2e-3)
        assert settings.data_order == "once" and settings.lr_schedule == "linear"
    with pytest.raises(UserError, match="unknown entrant"):
        Settings(entrants="none")
