"""Runs that share an out_dir: nothing is lost, none writes into another's, any can be requeued."""

import os
import signal
import subprocess
import sys

import pytest
from tiny_run import ROOT, arguments, determined, run_script

import train
from leangpt.runs.checkpoint import BEST, LAST, load_checkpoint
from leangpt.runs.folder import RUN_FILES, RunFolder
from leangpt.system.errors import UserError

SHORT = ["--max_iters=4", "--eval_interval=2"]
NAMES = sorted(RUN_FILES)


def files(folder):
    """{name: content} of everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def begin(folder, **options):
    with RunFolder(folder) as held:
        return held.begin(fresh=True, **options)


@pytest.fixture
def finished(tmp_path):
    """tmp_path/run, a run of adamsn."""
    train.main(arguments(tmp_path, "run", *SHORT, "--optimizer_variant=adamsn"))
    return tmp_path / "run"


# ------------------------------------------------------------------ one after the other


def test_a_fresh_run_moves_earlier_ones_aside_whole(tmp_path, finished, capsys):
    (finished / "tensorboard").mkdir()
    (finished / "tensorboard" / "events").write_text("curves")
    (finished / "notes.txt").write_text("the good one")
    first = files(finished)
    capsys.readouterr()
    train.main(arguments(tmp_path, "run", *SHORT, "--seed=2", "--optimizer_variant=adamsn"))
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"moved the earlier run in {finished} to ")
    assert said.endswith("run-adamsn")
    second = files(finished)
    train.main(arguments(tmp_path, "run", *SHORT, "--max_iters=0"))
    assert files(tmp_path / "run-adamsn") == first
    assert files(tmp_path / "run-adamsn-2") == second != first
    assert sorted(os.listdir(finished)) == sorted({*RUN_FILES} - {BEST})


def test_overwrite_erases_the_run_and_nothing_else(tmp_path, finished, capsys):
    (finished / "notes.txt").write_text("the good one")
    train.main(arguments(tmp_path, "run", "--max_iters=0", "--overwrite=True"))
    assert f"erased the earlier run in {finished}\n" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["data", "run"]
    assert (finished / "notes.txt").read_text() == "the good one"
    assert not (finished / BEST).exists()  # sample.py would take it for this run's
    assert load_checkpoint(finished / LAST)["iter_num"] == 0


@pytest.mark.slow
def test_the_newest_is_sampled_from(tmp_path, finished):
    train.main(arguments(tmp_path, "run", *SHORT, "--n_embd=8"))
    done = run_script(
        "sample.py",
        f"--out_dir={finished}",
        "--num_samples=1",
        "--max_new_tokens=5",
        "--device=cpu",
    )
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(finished / BEST)["model_args"]["n_embd"] == 8
    assert load_checkpoint(tmp_path / "run-adamsn" / BEST)["model_args"]["n_embd"] == 16


def test_a_run_that_did_nothing_is_no_run(tmp_path):
    """Killed before its first save; and a folder of other things."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.csv").write_text("iter,tokens,loss\n")
    (folder / "config.json").write_text("{}")
    (folder / "ckpt_last.pt.123.tmp").write_text("half a checkpoint")
    (folder / "shards-00000004").mkdir()
    (folder / "shards-00000004" / "__0_0.distcp").write_text("a process's half of one")
    assert begin(folder) is None
    assert sorted(os.listdir(folder)) == ["config.json", "metrics.csv"]
    (folder / "metrics.csv").write_text("iter,tokens,loss\n0,0,1.5\n")  # checkpoints deleted
    assert begin(folder).endswith("run-earlier")


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"optimizer_variant": "../../x"}'])
def test_names_come_from_known_optimizers_alone(tmp_path, config):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / BEST).write_text("nanoGPT's")
    (tmp_path / "run" / "config.json").write_text(config)
    begin(tmp_path / "run")
    assert (tmp_path / "run-earlier" / BEST).read_text() == "nanoGPT's"


def test_of_a_link_its_target_moves(tmp_path, finished):
    """The link is there to put runs on another disk: the new one belongs there too."""
    (tmp_path / "disk").mkdir()
    finished.rename(tmp_path / "disk" / "run")
    finished.symlink_to(tmp_path / "disk" / "run")
    begin(finished)
    assert sorted(os.listdir(tmp_path / "disk")) == ["run", "run-adamsn"]
    assert finished.is_symlink() and os.listdir(finished) == []


def test_folders_that_hold_more_than_a_run_stay(tmp_path, finished, monkeypatch):
    before = files(finished)
    with pytest.raises(UserError, match="not moved aside: give another out_dir, or --overwrite"):
        begin(finished, keep=(finished / "data" / "tiny",))
    monkeypatch.chdir(finished)
    with pytest.raises(UserError, match="not moved aside"):
        begin(".")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: os.rename("nothing", "there"))
    with pytest.raises(UserError, match="cannot be moved to .*run-adamsn .*No such file"):
        begin(finished)
    assert files(finished) == before


# ------------------------------------------------------------------ at once


def train_until(line, *flags):
    """train.py in a process of its own, which has printed a line that begins so."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for said in process.stdout:
        if said.startswith(line):
            return process
    raise AssertionError("it ended before")


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    endless = ["--max_iters=1000000", "--eval_interval=1000000"]
    holder = train_until("iter 3:", *arguments(tmp_path, "run", *endless))
    folder = tmp_path / "run"
    try:
        for start in ("scratch", "resume", "auto"):
            with pytest.raises(UserError, match=f"run is in use by process {holder.pid}"):
                train.main(arguments(tmp_path, "run", *SHORT, f"--init_from={start}"))
        train.main(arguments(tmp_path, "run", "--init_from=resume", "--eval_only=True"))  # looks
        assert holder.poll() is None and ".lock" in os.listdir(folder)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    train.main(arguments(tmp_path, "run", *SHORT, "--init_from=resume"))
    assert load_checkpoint(folder / LAST)["iter_num"] == 4
    assert sorted(os.listdir(folder)) == NAMES


# ------------------------------------------------------------------ requeued


@pytest.mark.slow
def test_auto_is_safe_to_requeue(tmp_path, monkeypatch):
    train.main(arguments(tmp_path, "whole", "--max_iters=8", "--eval_interval=3"))
    command = arguments(tmp_path, "cut", "--max_iters=8", "--eval_interval=3", "--init_from=auto")
    step = train.Trainer.step

    def step_and_signal(trainer, *tick):
        if trainer.iteration in (2, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *tick)

    monkeypatch.setattr(train.Trainer, "step", step_and_signal)
    for done in (3, 6):
        with pytest.raises(SystemExit) as stopped:
            train.main(command)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert load_checkpoint(tmp_path / "cut" / LAST)["iter_num"] == done
    train.main(command)
    train.main(command)  # nothing is left to do
    assert determined(tmp_path / "cut") == determined(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["cut", "data", "whole"]


def test_resuming_what_was_not_saved_yet_says_what_to_do(tmp_path):
    flags = arguments(tmp_path, "run", *SHORT, "--init_from=resume")
    with pytest.raises(UserError, match="nothing to resume: .* --init_from=auto, which does eit"):
        train.main(flags)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="overwrite=True erases what init_from=resume"):
        train.main([*flags, "--overwrite=True"])


@pytest.mark.slow
def test_a_terminal_that_goes_away_saves(tmp_path):
    """SIGHUP to a run whose output nobody takes any more."""
    flags = arguments(tmp_path, "run", "--max_iters=1000000", "--eval_interval=1000000")
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # where we have nohup
    )
    os.close(theirs)
    said = b""
    while b"iter 3:" not in said:
        said += os.read(ours, 1 << 16)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert load_checkpoint(tmp_path / "run" / LAST)["iter_num"] > 3
