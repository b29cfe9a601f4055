"""Training in bfloat16 weights from the command line: it learns, is saved as it is, and samples."""

import pytest
import torch
from tiny_run import arguments, determined, run_script

import train
from leangpt.runs.checkpoint import LAST, load_checkpoint
from leangpt.system.errors import UserError
from optimizers import make_optimizer

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


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_accumulation_in_bits_learns_as_float32_does(tmp_path, capsys, bits):
    schedule = [*BFLOAT16[:-1], "--gradient_accumulation_steps=4", "--optimizer_variant=muonsn8"]
    train.main(arguments(tmp_path, "float32", *schedule))
    capsys.readouterr()
    low = [*schedule, "--param_dtype=bfloat16", f"--optimizer_options=gradient_bits={bits}"]
    train.main(arguments(tmp_path, "low", *low))
    said = capsys.readouterr().out
    assert f"gradients summed in {bits} bits 0.0" in said
    assert all(float(row[-1]) > 0 for row in determined(tmp_path / "low") if row[2])  # norms
    loss = last_val_loss(tmp_path / "low")
    assert loss < float(determined(tmp_path / "low")[0][4]) - 0.5
    assert loss == pytest.approx(last_val_loss(tmp_path / "float32"), abs=0.05)


@pytest.mark.slow
def test_a_resumed_run_sums_as_if_it_had_not_stopped(tmp_path):
    low = ["--eval_interval=4", "--gradient_accumulation_steps=3", "--lr_decay_iters=8"]
    low += ["--param_dtype=bfloat16", "--optimizer_variant=adamsn8"]
    low += ["--optimizer_options=gradient_bits=8"]
    train.main(arguments(tmp_path, "whole", *low, "--max_iters=8"))
    train.main(arguments(tmp_path, "cut", *low, "--max_iters=4"))
    resumed = arguments(tmp_path, "cut", "--init_from=resume", "--max_iters=8", *low)
    train.main(resumed)
    whole, cut = (load_checkpoint(tmp_path / name / LAST)["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("options", ["fused_backward=True", "gradient_bits=8", "gradient_bits=4"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, capsys, options, clip):
    """Its parameter is named, the status is 1, and the last checkpoint is as it was."""

    def poisoned(settings, model, runtime):
        weight, calls = model.transformer.h[1].mlp.c_fc.weight, []

        def hook(grad):
            calls.append(1)
            return grad * float("nan") if len(calls) == 7 else grad

        weight.register_hook(hook)
        return make_optimizer(settings, model, runtime)

    flags = ["--max_iters=12", "--eval_interval=4", "--log_interval=100", "--compile=False"]
    flags += ["--param_dtype=bfloat16", "--optimizer_variant=muonsn8", f"--grad_clip={clip}"]
    with pytest.raises(SystemExit) as end:
        train.main(arguments(tmp_path, "run", *flags, f"--optimizer_options={options}"), poisoned)
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "the gradient of transformer.h.1.mlp.c_fc.weight is not finite" in said
    assert "(iteration 4)" in said and len(said.splitlines()) == 1
    saved = load_checkpoint(tmp_path / "run" / LAST)
    assert saved["iter_num"] == 4
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
