"""Training in bfloat16 weights from the command line: it learns, is saved as it is, and samples."""

import pytest
import torch
from tiny_run import arguments, determined, run_script

import train
from leangpt.system.errors import UserError
from leangpt.training.checkpoint import LAST, load_checkpoint

BFLOAT16 = ["--max_iters=40", "--eval_interval=40", "--eval_iters=0", "--param_dtype=bfloat16"]
FUSED = ["--optimizer_options=fused_backward=True", "--grad_clip=0"]


def last_val_loss(out_dir):
    return [float(row[4]) for row in determined(out_dir) if row[4]][-1]


@pytest.mark.slow
def test_the_readmes_command_learns_as_float32_does(tmp_path, capsys):
    """Half the weights' bytes, no standing gradients; the loss within a few hundredths."""
    schedule = [*BFLOAT16[:-1], "--optimizer_variant=muonsn8", *FUSED]
    train.main(arguments(tmp_path, "float32", *schedule))
    wide = capsys.readouterr().out
    train.main(arguments(tmp_path, "bfloat16", *schedule, "--param_dtype=bfloat16"))
    narrow = capsys.readouterr().out
    assert "memory     parameters 0.03 MB, gradients freed one by one, optimizer state" in wide
    assert "memory     parameters 0.01 MB, gradients freed one by one, optimizer state" in narrow
    assert "cpu (asked for), bfloat16" in narrow
    first = float(determined(tmp_path / "bfloat16")[0][4])
    loss = last_val_loss(tmp_path / "bfloat16")
    assert loss < first - 0.5
    assert loss == pytest.approx(last_val_loss(tmp_path / "float32"), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adamsn8", "adafactor", "muonsn4"])
def test_weights_stay_bfloat16_and_statistics_wider(tmp_path, variant):
    train.main(arguments(tmp_path, "run", *BFLOAT16, f"--optimizer_variant={variant}"))
    saved = load_checkpoint(tmp_path / "run" / LAST)
    assert {tensor.dtype for tensor in saved["model"].values()} == {torch.bfloat16}
    kept = {
        value.dtype
        for state in saved["optimizer"]["state"].values()
        for value in state.values()
        if torch.is_tensor(value)
    }
    assert torch.float32 in kept  # second moments
    assert last_val_loss(tmp_path / "run") < float(determined(tmp_path / "run")[0][4]) - 0.5


@pytest.mark.slow
def test_a_model_of_bfloat16_weights_is_sampled(tmp_path):
    train.main(arguments(tmp_path, "run", *BFLOAT16, "--optimizer_variant=muonsn8", *FUSED))
    done = run_script(
        "sample.py",
        f"--out_dir={tmp_path / 'run'}",
        "--num_samples=1",
        "--max_new_tokens=20",
        "--start=the king",
        "--device=cpu",
    )
    assert done.returncode == 0, done.stderr
    assert "the king" in done.stdout


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--dtype=float16", "--optimizer_variant=adamsn"], "leave out dtype=float16"),
        (["--dtype=float32", "--optimizer_variant=adamsn"], "leave out dtype=float32"),
        (["--optimizer_variant=adam"], "use adamsn8, muonsn8"),
    ],
)
def test_what_does_not_fit_bfloat16_weights_is_refused(tmp_path, flags, says):
    with pytest.raises(UserError, match=says):
        train.main(arguments(tmp_path, "run", *BFLOAT16, *flags))
    assert not (tmp_path / "run").exists()
