"""An interrupted run continues exactly: the same losses to the last bit, whatever stopped it."""

import json
import os
import signal
import textwrap

import pytest
import torch
from tiny_run import ROOT, arguments, determined, run_script

import train
from leangpt.parallel.engine import Parallel
from leangpt.runs.checkpoint import BEST, LAST, load_checkpoint
from leangpt.training import evaluation

SCHEDULE = [
    "--max_iters=8",
    "--eval_interval=3",
    "--dropout=0.1",
    "--gradient_accumulation_steps=2",
]


def same_weights(one, other):
    one, other = load_checkpoint(one)["model"], load_checkpoint(other)["model"]
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def assert_same_run(one, other):
    assert determined(one) == determined(other)
    assert same_weights(one / LAST, other / LAST)
    assert same_weights(one / BEST, other / BEST)


def stop_at(monkeypatch, iteration, number):
    """Send this process a signal while that iteration's step runs."""
    step = train.Trainer.step

    def step_and_signal(trainer, *tick):
        if trainer.iteration == iteration:
            os.kill(os.getpid(), number)
        return step(trainer, *tick)

    monkeypatch.setattr(train.Trainer, "step", step_and_signal)


# bfloat16 weights, 8-bit momentum, each gradient applied and freed during the backward pass
LOW_BYTE = (
    "muonsn8",
    "--param_dtype=bfloat16",
    "--optimizer_options=fused_backward=True",
    "--grad_clip=0.5",
    "--gradient_accumulation_steps=1",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, number, iteration",
    [
        (("adam",), signal.SIGTERM, 4),
        (("adamsn",), signal.SIGINT, 2),
        (("adafactor",), signal.SIGTERM, 0),
        (("muonsn8",), signal.SIGTERM, 5),
        (LOW_BYTE, signal.SIGTERM, 4),
    ],
    ids=lambda value: "+".join(value[:2]) if isinstance(value, tuple) else str(value),
)
def test_after_a_signal(tmp_path, monkeypatch, capsys, variant, number, iteration):
    flags = [*SCHEDULE, f"--optimizer_variant={variant[0]}", *variant[1:]]
    train.main(arguments(tmp_path, "whole", *flags))
    with monkeypatch.context() as patch:
        stop_at(patch, iteration, number)
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments(tmp_path, "cut", *flags))
    assert stopped.value.code == 128 + number
    reached = iteration + ("--gradient_accumulation_steps=1" in flags)  # else between micro-batches
    assert f"stopped by {number.name} before iteration {reached};" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "cut" / LAST)["iter_num"] == reached
    train.main(arguments(tmp_path, "cut", *flags, "--init_from=resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [("adam",), ("muonsn8",), (*LOW_BYTE[:3], "--optimizer_options=gradient_bits=8")]
)
def test_a_long_iteration_is_left_between_micro_batches(tmp_path, monkeypatch, variant):
    """What it has of gradients is dropped, in 8 bits too, and the iteration done again."""
    flags = [*SCHEDULE, f"--optimizer_variant={variant[0]}", *variant[1:]]
    flags += ["--gradient_accumulation_steps=5"]
    train.main(arguments(tmp_path, "whole", *flags))
    begin, begun = Parallel.begin_micro_batch, []

    def begin_and_signal(parallel, last):
        begun.append(last)
        if len(begun) == 4 * 5 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(parallel, last)

    with monkeypatch.context() as patch:
        patch.setattr(Parallel, "begin_micro_batch", begin_and_signal)
        with pytest.raises(SystemExit):
            train.main(arguments(tmp_path, "cut", *flags))
    assert len(begun) == 4 * 5 + 2
    assert load_checkpoint(tmp_path / "cut" / LAST)["iter_num"] == 4
    train.main(arguments(tmp_path, "cut", *flags, "--init_from=resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_the_best_loss_so_far_is_remembered(tmp_path, monkeypatch):
    """A learning rate that rises until it does harm; the best evaluation is before the stop."""
    flags = ["--max_iters=10", "--eval_interval=2", "--warmup_iters=0", "--min_lr=1"]
    train.main(arguments(tmp_path, "whole", *flags))
    with monkeypatch.context() as patch:
        stop_at(patch, 8, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train.main(arguments(tmp_path, "cut", *flags))
    train.main(arguments(tmp_path, "cut", *flags, "--init_from=resume"))
    assert load_checkpoint(tmp_path / "whole" / BEST)["iter_num"] < 8
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_signal_during_evaluation(tmp_path, monkeypatch):
    flags = [*SCHEDULE, "--optimizer_variant=adamsn"]
    train.main(arguments(tmp_path, "whole", *flags))
    batches, calls = evaluation.evaluation_batches, []

    def batches_and_signal(dataset, split, *where):
        calls.append(split)
        for batch in batches(dataset, split, *where):
            if calls == ["train", "val"] * 2:  # the evaluation before iteration 3
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluation_batches", batches_and_signal)
        with pytest.raises(SystemExit):
            train.main(arguments(tmp_path, "cut", *flags))
    assert [row[0] for row in determined(tmp_path / "cut")] == ["0", "0", "1", "2"]
    train.main(arguments(tmp_path, "cut", *flags, "--init_from=resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_resumed_run_keeps_its_settings_and_takes_new_ones(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train.main(arguments(tmp_path, "run", *SCHEDULE, "--optimizer_variant=adamsn"))
    train.main(
        [
            "--init_from=resume",
            f"--out_dir={tmp_path / 'run'}",
            "--max_iters=10",
            "--learning_rate=1e-3",
            f"--data_dir={tmp_path / 'data'}",
        ]
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["optimizer_variant"], config["dropout"]) == ("adamsn", 0.1)
    assert (config["max_iters"], config["learning_rate"]) == (10, 1e-3)
    assert "resuming   from iteration 4" in capsys.readouterr().out
    rows = determined(tmp_path / "run")
    assert rows[-1][0] == "10" and float(rows[-2][5]) < 1e-3  # lr: the new one's schedule


def test_another_optimizer_starts_fresh_and_says_so(tmp_path, capsys):
    train.main(arguments(tmp_path, "run", "--max_iters=3"))
    train.main(
        [
            "--init_from=resume",
            f"--out_dir={tmp_path / 'run'}",
            "--max_iters=5",
            "--optimizer_variant=adafactor",
            f"--data_dir={tmp_path / 'data'}",
        ]
    )
    assert (
        "note: optimizer state starts fresh: it was saved by adam, this run uses adafactor"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("variant", ["adam", "adamsn8", "adafactor", "muonsn8"])
def test_a_cropped_models_optimizer_goes_on(tmp_path, capsys, variant):
    """Positions are cropped from 16 to 8, their state too (tests/optim/test_saved_states.py)."""
    train.main(arguments(tmp_path, "run", "--max_iters=3", f"--optimizer_variant={variant}"))
    train.main(
        [
            "--init_from=resume",
            f"--out_dir={tmp_path / 'run'}",
            f"--data_dir={tmp_path / 'data'}",
            "--max_iters=5",
            "--block_size=8",
        ]
    )
    assert "starts fresh" not in capsys.readouterr().out
    state = load_checkpoint(tmp_path / "run" / LAST)["optimizer"]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {5}


@pytest.mark.slow
def test_rows_beyond_the_checkpoint_and_torn_rows_are_dropped(tmp_path):
    train.main(arguments(tmp_path, "whole", *SCHEDULE))
    train.main(arguments(tmp_path, "cut", *SCHEDULE, "--max_iters=6", "--lr_decay_iters=8"))
    metrics = tmp_path / "cut" / "metrics.csv"
    with open(metrics, "a") as file:
        file.write("7,448,9.9,,,0.1,1.0,1,1,1,1\n8,512,9.")
    train.main(arguments(tmp_path, "cut", *SCHEDULE, "--init_from=resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_fresh_run_replaces_an_older_runs_state(tmp_path):
    """Else a run killed before its first save would resume somebody else's."""
    train.main(arguments(tmp_path, "run", "--max_iters=6", "--seed=5"))
    train.main(arguments(tmp_path, "run", "--max_iters=0"))
    assert load_checkpoint(tmp_path / "run" / LAST)["iter_num"] == 0
    assert [row[0] for row in determined(tmp_path / "run")] == ["0"]


# A run does something to files of out_dir some tens of times: open, rename, link, remove, mkdir.
# The driver kills the n-th attempt of that with SIGKILL, for several n, each in its own process,
# and then resumes (or starts again, where not even a first checkpoint was written).
DRIVER = """
import os, signal, sys
import torch._dynamo  # every optimizer step asks for it: imported once, not once a child
import train
from pathlib import Path

root, *flags = sys.argv[1:]
EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir")

def in_process(name, kill_at, *more):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out_dir, seen = f"{root}/{name}", 0
    def watch(event, arguments):
        nonlocal seen
        if event in EVENTS and any(str(a).startswith(out_dir) for a in arguments):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    train.main([*flags, f"--out_dir={out_dir}", *more])
    Path(f"{root}/{name}.events").write_text(str(seen))
    os._exit(0)

assert in_process("whole", None) == 0
total = int(Path(f"{root}/whole.events").read_text())
for kill_at in range(2, total + 1, 3):
    name = f"killed{kill_at}"
    assert in_process(name, kill_at) == -signal.SIGKILL
    started = os.path.exists(f"{root}/{name}/ckpt_last.pt")
    assert in_process(name, None, f"--init_from={'resume' if started else 'scratch'}") == 0
    print(name, "resumed" if started else "restarted")
"""


@pytest.mark.slow
def test_killed_at_any_file_operation(tmp_path):
    """SIGKILL before, between and within saves; only the checkpoints' own promises help then."""
    flags = arguments(
        tmp_path,
        "unused",
        "--max_iters=6",
        "--eval_interval=2",
        "--dropout=0.1",
        "--optimizer_variant=adamsn",
    )
    flags = [flag for flag in flags if not flag.startswith("--out_dir")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(DRIVER))
    result = run_script(str(driver), str(tmp_path), *flags, env=environment)
    assert result.returncode == 0, result.stderr
    outcomes = [line.split() for line in result.stdout.splitlines()]
    assert len(outcomes) >= 10
    assert {outcome for _, outcome in outcomes} == {"resumed", "restarted"}
    for name, _ in outcomes:
        assert_same_run(tmp_path / "whole", tmp_path / name)
