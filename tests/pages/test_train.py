"""train.py in this process and as a script: what a run does, leaves behind and reads."""

import json
import math
import os
import time

import pytest
import torch
from pretrained_files import gpt2_config, gpt2_tensors, write_folder
from tiny_run import arguments, determined, run_script

import train
from configurator import parse_config
from leangpt.optim import VARIANTS
from leangpt.runs.checkpoint import BEST, LAST, load_checkpoint, model_from_checkpoint
from leangpt.system.errors import UserError
from leangpt.text.dataset import load_dataset
from model import GPT, GPTConfig
from optimizers import lr_factor, parse_options

SHORT = ["--max_iters=4", "--eval_interval=2"]


def settings(*flags):
    return parse_config(train.Settings, list(flags))[0]


def column(out_dir, index):
    return [row[index] for row in determined(out_dir) if row[index]]


# ------------------------------------------------------------------ what a run leaves behind


def test_a_run_learns_and_leaves_its_files(tmp_path, capsys):
    train.main(
        arguments(
            tmp_path,
            "run",
            "--max_iters=40",
            "--eval_interval=20",
            "--optimizer_variant=adamsn",
            "--log_interval=10",
        )
    )
    out = capsys.readouterr().out
    run = tmp_path / "run"
    assert sorted(os.listdir(run)) == [BEST, LAST, "config.json", "metrics.csv", "run.json"]
    evaluations = [float(loss) for loss in column(run, 4)]
    assert len(evaluations) == 3 and evaluations[-1] < evaluations[0] - 0.5
    assert [row[0] for row in determined(run)] == ["0", "0", "10", "20", "20", "30", "40"]
    config = json.loads((run / "config.json").read_text())
    assert config["n_embd"] == 16 and config["optimizer_variant"] == "adamsn"
    for start in (
        "device     cpu (asked for), float32",
        "data       tiny: ",
        "model      ",
        "attention  cache",
        "memory     parameters 0.03 MB, gradients 0.03 MB, optim",
        "optimizer  role",
        "           mlp_in ",
        "           total ",
        "batch      64 tokens per iteration: 1 x 4 sequences of 16",
        "changed    ",
        "step 0: train loss ",
        "iter 0: loss ",
        "iter 30: loss ",
        "step 40: ",
        "done: 40",
    ):
        assert any(line.startswith(start) for line in out.splitlines()), start
    assert "\r" not in out
    line = next(line for line in out.splitlines() if line.startswith("iter 30"))
    for part in ("lr ", "norm ", " tok/s", " ms", "peak ", "eta "):
        assert part in line
    checkpoint = torch.load(run / BEST, weights_only=True)
    assert {
        "model",
        "optimizer",
        "model_args",
        "iter_num",
        "best_val_loss",
        "config",
        "dataset",
    } <= set(checkpoint)
    assert checkpoint["dataset"]["characters"] and checkpoint["best_val_loss"] == min(evaluations)


def test_the_summary_counts_the_optimizer_state_it_will_have(tmp_path, capsys):
    from leangpt.optim import state_bytes
    from leangpt.system.runtime import setup_runtime

    train.main(arguments(tmp_path, "run", *SHORT, "--optimizer_variant=adamsn"))
    said = capsys.readouterr().out.split("optimizer state ")[1].split(" MB")[0]
    config, given = parse_config(
        train.Settings, arguments(tmp_path, "run", "--optimizer_variant=adamsn")
    )
    trainer = train.Trainer(config, given, setup_runtime("cpu"))
    trainer.step()
    assert float(said) == round(state_bytes(trainer.optimizer) / 1e6, 2) > 0


@pytest.mark.slow
def test_the_best_is_kept_while_the_last_moves_on(tmp_path):
    """A learning rate that rises until it does harm: the best model stays."""
    rising = ["--max_iters=8", "--eval_interval=2", "--warmup_iters=0", "--min_lr=1"]
    train.main(arguments(tmp_path, "run", *rising))
    losses = [float(loss) for loss in column(tmp_path / "run", 4)][1:]
    best, last = (load_checkpoint(tmp_path / "run" / name) for name in (BEST, LAST))
    assert last["iter_num"] == 8
    assert best["iter_num"] == 2 * (1 + losses.index(min(losses))) < 8
    assert best["best_val_loss"] == last["best_val_loss"] == min(losses)
    train.main(arguments(tmp_path, "always", *rising, "--always_save_checkpoint=True"))
    assert load_checkpoint(tmp_path / "always" / BEST)["iter_num"] == 8


def test_eval_only_writes_nothing(tmp_path, capsys):
    train.main(arguments(tmp_path, "run", "--eval_only=True"))
    assert "step 0: train loss" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_seconds_of_training_exclude_the_rest(tmp_path, monkeypatch):
    """The clock stands still while evaluating: here an evaluation takes a tenth of a second."""
    evaluate = train.evaluate

    def slowly(*what):
        time.sleep(0.1)
        return evaluate(*what)

    monkeypatch.setattr(train, "evaluate", slowly)
    began = time.perf_counter()
    train.main(arguments(tmp_path, "run", "--max_iters=6", "--eval_interval=1"))
    elapsed = time.perf_counter() - began
    assert load_checkpoint(tmp_path / "run" / LAST)["train_seconds"] < elapsed - 0.7


# ------------------------------------------------------------------ the same numbers


@pytest.mark.slow
def test_evaluation_does_not_disturb_training(tmp_path):
    flags = ["--max_iters=6", "--dropout=0.1"]
    train.main(arguments(tmp_path, "often", *flags, "--eval_interval=1"))
    train.main(arguments(tmp_path, "never", *flags, "--eval_interval=100", "--eval_iters=1"))
    assert column(tmp_path / "often", 2) == column(tmp_path / "never", 2)


@pytest.mark.slow
def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    train.main(arguments(tmp_path, "one", *SHORT, "--batch_size=8"))
    train.main(
        arguments(
            tmp_path,
            "four",
            *SHORT,
            "--batch_size=2",
            "--gradient_accumulation_steps=4",
            "--eval_iters=8",
        )
    )
    for one, four in zip(determined(tmp_path / "one"), determined(tmp_path / "four")):
        assert [float(v or 0) for v in one] == pytest.approx([float(v or 0) for v in four], 1e-5)


@pytest.mark.slow
def test_another_seed_is_another_run(tmp_path):
    for seed in (1, 2):
        train.main(arguments(tmp_path, f"seed{seed}", *SHORT, f"--seed={seed}"))
    assert not set(column(tmp_path / "seed1", 2)) & set(column(tmp_path / "seed2", 2))


@pytest.mark.slow
def test_whole_split_evaluation_is_the_mean_over_every_block(tmp_path):
    train.main(
        arguments(tmp_path, "run", *SHORT, "--eval_iters=0", "--batch_size=3", "--dropout=0.5")
    )
    model = model_from_checkpoint(GPT, load_checkpoint(tmp_path / "run" / LAST)).double().eval()
    val = torch.from_numpy(load_dataset("tiny", tmp_path / "data").val.astype("int64"))
    blocks = (len(val) - 1) // 16
    assert blocks % 3  # the last batch is smaller: a mean of batch means would be wrong
    x, y = val[: blocks * 16].view(blocks, 16), val[1 : blocks * 16 + 1].view(blocks, 16)
    with torch.no_grad():
        wanted = model(x, y)[1].item()
    assert float(column(tmp_path / "run", 4)[-1]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, near",
    [
        ("bfloat16", 0.02),
        ("float16", 0.05),  # float16 skips a step or two to find its loss scale
    ],
)
def test_autocast_follows_float32(tmp_path, dtype, near):
    train.main(arguments(tmp_path, "float32", *SHORT))
    train.main(arguments(tmp_path, dtype, *SHORT, f"--dtype={dtype}"))
    wanted, got = (column(tmp_path / name, 2) for name in ("float32", dtype))
    assert [float(v) for v in got] == pytest.approx([float(v) for v in wanted], abs=near)
    assert wanted != got
    scaler = load_checkpoint(tmp_path / dtype / LAST)["scaler"]
    assert bool(scaler) == (dtype == "float16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--attention_policy=recompute", "--q_chunk=8", "--k_chunk=4"], ["--checkpoint_layers=True"]],
)
def test_policies_train_alike(tmp_path, flags):
    train.main(arguments(tmp_path, "cache", *SHORT))
    train.main(arguments(tmp_path, "other", *SHORT, *flags))
    wanted, got = (column(tmp_path / name, 2) for name in ("cache", "other"))
    assert [float(v) for v in got] == pytest.approx([float(v) for v in wanted], abs=1e-5)


def test_evaluated_at_the_end_alone(tmp_path):
    train.main(arguments(tmp_path, "often", "--max_iters=4", "--eval_interval=4"))
    train.main(arguments(tmp_path, "once", "--max_iters=4", "--eval_interval=0"))
    often, once = (determined(tmp_path / name) for name in ("often", "once"))
    assert [row for row in once if row[4]] == [row for row in often if row[4]][1:]
    assert (tmp_path / "once" / BEST).exists()


# ------------------------------------------------------------------ learning rate and options


def test_schedule_is_nanogpts():
    config = settings(
        "--learning_rate=6e-4",
        "--min_lr=6e-5",
        "--warmup_iters=10",
        "--lr_decay_iters=50",
        "--max_iters=100",
    )

    def nanogpt(it):
        if it < 10:
            return 6e-4 * (it + 1) / 11
        if it > 50:
            return 6e-5
        return 6e-5 + 0.5 * (1 + math.cos(math.pi * (it - 10) / 40)) * (6e-4 - 6e-5)

    for it in range(100):
        assert 6e-4 * lr_factor(it, config, 6e-4) == pytest.approx(nanogpt(it), rel=1e-12), it


def test_schedule_defaults():
    config = settings("--max_iters=20", "--warmup_iters=0", "--optimizer_variant=adamsn")
    assert [lr_factor(it, config, 1e-3) for it in (0, 20, 99)] == [1.0, 0.1, 0.1]
    config = settings("--max_iters=20", "--warmup_iters=20")
    assert lr_factor(19, config, 1e-3) == 20 / 21 and lr_factor(20, config, 1e-3) == 0.1
    assert lr_factor(7, settings("--decay_lr=False"), 1e-3) == 1.0


def test_linear_schedule_reaches_zero():
    config = settings("--max_iters=30", "--warmup_iters=10", "--lr_schedule=linear", "--min_lr=0")
    assert lr_factor(9, config, 1e-3) == 10 / 11 and lr_factor(10, config, 1e-3) == 1.0
    assert lr_factor(15, config, 1e-3) == 0.75 and lr_factor(29, config, 1e-3) == pytest.approx(
        0.05
    )
    assert lr_factor(30, config, 1e-3) == 0.0
    with pytest.raises(UserError, match="lr_schedule 'square'; use cosine or linear"):
        settings("--lr_schedule=square")


def test_every_group_follows_the_schedule(tmp_path):
    train.main(arguments(tmp_path, "run", *SHORT, "--embedding_lr=0.003", "--beta2=0.99"))
    groups = load_checkpoint(tmp_path / "run" / LAST)["optimizer"]["param_groups"]
    rates = {group["name"]: group["initial_lr"] for group in groups}
    assert rates == {"linear": 0.01, "embedding": 0.003, "vector": 0.003}
    factors = {round(group["lr"] / group["initial_lr"], 9) for group in groups}
    assert len(factors) == 1 and factors.pop() < 1
    assert {group["betas"] for group in groups} == {(0.9, 0.99)}


def test_options_are_read_as_python_values():
    assert parse_options("") == {}
    assert parse_options("role_rates={'mlp_in':2,'mlp_out':0.5},norm=sum") == {
        "role_rates": {"mlp_in": 2, "mlp_out": 0.5},
        "norm": "sum",
    }
    assert parse_options("partition=row, momentum_bits=8,foreach=False,eps=1e-6") == {
        "partition": "row",
        "momentum_bits": 8,
        "foreach": False,
        "eps": 1e-6,
    }


def test_options_reach_the_optimizer(tmp_path):
    train.main(
        arguments(
            tmp_path,
            "run",
            *SHORT,
            "--optimizer_variant=adamsn",
            "--optimizer_options=norm=sum,partition=larger",
        )
    )
    groups = load_checkpoint(tmp_path / "run" / LAST)["optimizer"]["param_groups"]
    linear = [group for group in groups if group["name"] not in ("embedding", "vector")]
    assert {(g["norm"], g["partition"]) for g in linear} == {("sum", "larger")}


# ------------------------------------------------------------------ where weights come from


def nanogpt_checkpoint(path, vocab_size, state=True):
    """A file as nanoGPT's train.py writes it, after one step of its optimizer."""
    shape = dict(
        n_layer=2,
        n_head=2,
        n_embd=16,
        block_size=16,
        bias=False,
        vocab_size=vocab_size,
        dropout=0.0,
    )
    torch.manual_seed(3)
    model = GPT(GPTConfig(**shape))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    model(torch.ones(1, 4).long(), torch.ones(1, 4).long())[1].backward()
    optimizer.step()
    path.parent.mkdir(parents=True)
    torch.save(
        {
            "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "model_args": shape,
            "iter_num": 2,
            "best_val_loss": torch.tensor(3.5),
            "config": {"device": "cuda", "dtype": "float16", "learning_rate": 1e-3},
        },
        path,
    )
    return model


@pytest.mark.parametrize("variant, fresh", [("adam", False), ("adamsn", True)])
def test_nanogpts_checkpoint_is_resumed(tmp_path, capsys, variant, fresh):
    flags = arguments(
        tmp_path, "run", *SHORT, f"--optimizer_variant={variant}", "--init_from=resume"
    )
    nanogpt_checkpoint(tmp_path / "run" / BEST, load_dataset("tiny", tmp_path / "data").vocab_size)
    train.main(flags)
    out = capsys.readouterr().out
    assert "resuming   from iteration 2" in out
    assert ("note: optimizer state starts fresh" in out) == fresh
    steps = {
        float(state["step"])
        for state in load_checkpoint(tmp_path / "run" / LAST)["optimizer"]["state"].values()
    }
    assert steps == {2.0 if fresh else 3.0}


@pytest.mark.slow
def test_published_weights_are_finetuned(tmp_path):
    folder = write_folder(
        tmp_path / "gpt2", gpt2_config(vocab_size=30), gpt2_tensors(vocab_size=30)
    )
    flags = [
        flag
        for flag in arguments(tmp_path, "run", *SHORT, "--eval_iters=0")
        if not flag.startswith(("--n_", "--block_size"))
    ]
    train.main([*flags, f"--init_from={folder}", "--block_size=12"])
    checkpoint = load_checkpoint(tmp_path / "run" / LAST)
    assert checkpoint["model_args"]["n_embd"] == 24 and checkpoint["model_args"]["bias"] is True
    assert checkpoint["config"]["block_size"] == checkpoint["model_args"]["block_size"] == 12
    losses = [float(loss) for loss in column(tmp_path / "run", 4)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_updates_inside_backward(tmp_path):
    fused = ["--optimizer_variant=adamsn", "--optimizer_options=fused_backward=True"]
    with pytest.raises(UserError, match="needs gradient_accumulation_steps=1"):
        train.main(
            arguments(
                tmp_path, "run", *SHORT, *fused, "--grad_clip=0", "--gradient_accumulation_steps=2"
            )
        )
    with pytest.raises(UserError, match="use bfloat16"):
        train.main(arguments(tmp_path, "run", *SHORT, *fused, "--grad_clip=0", "--dtype=float16"))
    assert not (tmp_path / "run").exists()
    train.main(arguments(tmp_path, "run", *SHORT, *fused, "--grad_clip=0"))
    train.main(
        arguments(
            tmp_path,
            "plain",
            *SHORT,
            "--optimizer_variant=adamsn",
            "--grad_clip=0",
            "--optimizer_options=update_clip=1.0",
        )
    )
    assert column(tmp_path / "run", 2) == pytest.approx(column(tmp_path / "plain", 2))


@pytest.mark.slow
def test_help_lists_every_setting():
    result = run_script("train.py", "--help")
    assert result.returncode == 0
    for name in vars(settings()):
        assert f"--{name}: " in result.stdout
    assert "  " + " | ".join(VARIANTS) + "\n" in result.stdout
