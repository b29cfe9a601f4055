"""train.py where something goes wrong: wrong input, losses that are not finite, no memory."""

import sys
import threading
from types import SimpleNamespace

import pytest
from pretrained_files import gpt2_config, gpt2_tensors, write_folder
from tiny_run import arguments, run_script

import train
from leangpt.runs.checkpoint import LAST, load_checkpoint
from leangpt.system.errors import UserError
from leangpt.text import integrity
from leangpt.training.log import TrainingLog

SHORT = ["--max_iters=4", "--eval_interval=2"]


@pytest.mark.parametrize("interval, what", [(100, "the loss"), (1, "the validation loss")])
def test_what_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, capsys, interval, what):
    with pytest.raises(SystemExit) as stopped:
        train.main(
            arguments(
                tmp_path,
                "run",
                "--max_iters=50",
                f"--eval_interval={interval}",
                "--warmup_iters=0",
                "--learning_rate=1e20",
            )
        )
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {what} is not finite at iteration ") and LAST in error
    assert error.count("\n") == 1 and int(error.split("iteration ")[1].split(";")[0]) < 20
    kept = load_checkpoint(tmp_path / "run" / LAST)
    assert f"(iteration {kept['iter_num']})" in error
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


MISTAKES = [
    ("--n_layer=0", "n_layer must be positive"),
    ("--batch_size=0", "batch_size must be positive"),
    ("--block_size=-1", "block_size must be positive"),
    ("--log_interval=0", "log_interval must be positive"),
    ("--eval_interval=-1", "eval_interval must not be negative"),
    ("--gradient_accumulation_steps=0", "gradient_accumulation_steps must be positive"),
    ("--max_iters=-1", "max_iters must not be negative"),
    ("--grad_clip=-1", "grad_clip must not be negative"),
    ("--dropout=1.5", "dropout must lie in"),
    ("--n_head=3", "n_head=3 does not divide n_embd=16"),
    ("--n_kv_head=3", "n_kv_head=3 does not divide n_head=2"),
    ("--attention_policy=cahce", "unknown attention_policy 'cahce'"),
    ("--position=rotary", "unknown position 'rotary'"),
    ("--q_chunk=0", "q_chunk must be positive"),
    ("--k_chunk=8", "k_chunk=8 does nothing"),
    ("--offload=True", "moves layers' inputs from a GPU to the host, and this run is on cpu"),
    ("--int4=True", "int4=True packs weights"),
    ("--optimizer_variant=adamns", "did you mean 'adamsn'"),
    ("--optimizer_options=partition", "'partition' is not name=value"),
    ("--optimizer_options=partitoin=row", "partitoin"),
    ("--optimizer_options=foreach=maybe", "foreach=maybe should be bool"),
    ("--optimizer_options=partition=rows", "rows"),
    ("--optimizer_options=partition=-1", "partition must be one of .* not -1"),
    ("--optimizer_options=embedding_partition=0", "partition must be one of .* not 0"),
    ("--optimizer_options=betas=(0.9,0.95)", "betas is set by --beta1 and --beta2"),
    ("--optimizer_options=learning_rate=1", "learning_rate is set by --learning_rate"),
    ("--optimizer_options=weight_decay=0", "weight_decay is set by --weight_decay"),
    ("--optimizer_options=grad_clip=0", "grad_clip is set by --grad_clip"),
    ("--optimizer_options=variant=adam", "variant is set by --optimizer_variant"),
    ("--optimizer_options=model=x", "model is set by"),
    ("--optimizer_options=eps=99999999999999999999", "eps is too large"),
    ("--optimizer_options=gradient_bits=None", "gradient_bits must be 8 or 4, not None"),
    ("--optimizer_options=gradient_bits=''", "gradient_bits must be 8 or 4, not ''"),
    ("--optimizer_options=gradient_bits=8.5", "gradient_bits must be 8 or 4, not 8.5"),
    ("--optimizer_options=row_blocks=(8,8)", "has no option 'row_blocks'"),
    ("--optimizer_options=lr=1", "has no option 'lr'"),
    ("--optimizer_options=params=1", "has no option 'params'"),
    ("--optimizer_options=self=1", "has no option 'self'"),
    ("--optimizer_options=nu1=nan", "nu1=nan should be float"),
    ("--optimizer_options=nu1=None", "nu1=None should be float"),
    ("--memory=24", "memory=24: that is no memory; write bytes as 24GB"),
    ("--learning_rate=-1", "learning_rate must be positive"),
    ("--beta2=1.5", "betas|beta"),
    ("--device=gpu", "unknown device 'gpu'"),
    ("--dtype=int8", "unknown dtype 'int8'"),
    ("--param_dtype=float16", "unknown param_dtype 'float16'"),
    ("--param_dtype=bfloat16", "which adam does not"),
    ("--backend=mpi", "unknown backend 'mpi'"),
    ("--dataset=nothing", "prepare_text.py --input FILE --name nothing"),
    ("--block_size=100000", "too few for block_size=100000"),
    ("--init_from=resume", "no checkpoint yet; start the run with --init_from=scratch"),
    ("--n_layers=2", "did you mean n_layer"),
    ("--max_iters=many", "expected int"),
    ("--out_dir=/dev/null/run", "cannot write to /dev/null/run"),
]


@pytest.mark.parametrize("flag, says", MISTAKES, ids=[flag for flag, _ in MISTAKES])
def test_mistakes_write_nothing(tmp_path, flag, says):
    flags = arguments(tmp_path, "run", *SHORT)
    if "optimizer_options" in flag:
        flags.append("--optimizer_variant=adamsn")
    with pytest.raises(UserError, match=says):
        train.main([*flags, flag])
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_shapes_is_refused(tmp_path):
    train.main(arguments(tmp_path, "run", *SHORT))
    before = (tmp_path / "run" / LAST).read_bytes()
    with pytest.raises(UserError, match="n_layer=3 contradicts the weights"):
        train.main(arguments(tmp_path, "run", "--init_from=resume", "--n_layer=3"))
    with pytest.raises(UserError, match="^kv_heads=1 contradicts .* which have kv_heads=2; leave"):
        train.main(arguments(tmp_path, "run", "--init_from=resume", "--kv-heads=1"))
    assert (tmp_path / "run" / LAST).read_bytes() == before
    train.main(arguments(tmp_path, "run", "--init_from=resume", "--kv-heads=2", *SHORT))


def test_a_rate_that_rises_is_said(tmp_path, capsys):
    train.main(arguments(tmp_path, "run", *SHORT, "--min_lr=0.02"))
    assert "note: min_lr is above the learning rate" in capsys.readouterr().out


def test_adafactors_two_eps_are_two(tmp_path):
    flags = arguments(tmp_path, "run", *SHORT, "--optimizer_variant=adafactor")
    for eps in ("0", "nan", "[]", "None", "x", "(1,2,3)"):
        with pytest.raises(UserError, match="adafactor's eps must be two numbers"):
            train.main([*flags, f"--optimizer_options=eps={eps}"])


@pytest.mark.parametrize("tiles", ["--q_chunk=8", "--checkpoint_layers"])
def test_attention_dropout_under_tiles_is_refused_before_anything_is_evaluated(tmp_path, tiles):
    flags = arguments(tmp_path, "run", *SHORT, tiles)
    with pytest.raises(UserError, match="attention dropout cannot be replayed"):
        train.main([*flags, "--dropout=0.1"])
    assert not (tmp_path / "run").exists()
    train.main([*flags, "--dropout=0.1", "--attention_dropout=0"])
    train.main([*flags, "--dropout=0.1", "--init_from=resume", "--eval_only"])


def test_another_vocabulary_is_refused(tmp_path):
    folder = write_folder(
        tmp_path / "gpt2", gpt2_config(vocab_size=2000), gpt2_tensors(vocab_size=2000)
    )
    flags = [flag for flag in arguments(tmp_path, "run") if not flag.startswith("--n_")]
    with pytest.raises(UserError, match="the model 2000: they do not share a tokenizer"):
        train.main([*flags, f"--init_from={folder}"])


def test_another_text_of_the_same_vocabulary_size_is_refused(tmp_path):
    train.main(arguments(tmp_path, "run", *SHORT))
    for name in ("train.bin", "val.bin", "meta.json"):
        other = tmp_path / "data" / "other"
        other.mkdir(exist_ok=True)
        content = (tmp_path / "data" / "tiny" / name).read_bytes()
        (other / name).write_bytes(content.replace(b"ghi", b"GHI"))
    with pytest.raises(UserError, match="other has another vocabulary than tiny"):
        train.main(arguments(tmp_path, "run", "--init_from=resume", "--dataset=other"))


@pytest.mark.parametrize(
    "flag, package", [("--wandb_log=True", "wandb"), ("--tensorboard_log=True", "tensorboard")]
)
def test_trackers_that_are_not_installed(tmp_path, monkeypatch, flag, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)  # import then fails as if absent
    with pytest.raises(UserError, match=f"pip install {package}"):
        train.main(arguments(tmp_path, "run", *SHORT, flag))
    assert not (tmp_path / "run").exists()


def test_trackers_get_every_row_and_are_closed(tmp_path, monkeypatch):
    """Stand-ins for both packages; the second run ends by a loss that is not finite."""
    logged, closed = [], []
    run = SimpleNamespace(
        log=lambda numbers, step: logged.append(("wandb", step, *numbers)),
        finish=lambda: closed.append("wandb"),
    )
    board = SimpleNamespace(
        add_scalar=lambda name, value, step: logged.append(("tensorboard", step, name)),
        close=lambda: closed.append("tensorboard"),
    )
    modules = {
        "wandb": SimpleNamespace(init=lambda **_: run),
        "torch.utils.tensorboard": SimpleNamespace(SummaryWriter=lambda folder: board),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    trackers = ["--wandb_log=True", "--tensorboard_log=True"]
    train.main(arguments(tmp_path, "run", *SHORT, *trackers))
    assert {entry[:2] for entry in logged if "val_loss" in entry} >= {
        ("wandb", 0),
        ("tensorboard", 0),
    }
    assert ("tensorboard", 1, "loss") in logged
    with pytest.raises(SystemExit):
        train.main(arguments(tmp_path, "bad", *SHORT, *trackers, "--learning_rate=1e30"))
    assert closed == ["wandb", "tensorboard"] * 2


@pytest.mark.slow
def test_the_script_ends_with_one_line_and_status_2(tmp_path):
    result = run_script("train.py", *arguments(tmp_path, "run", "--n_head=3"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: n_head=3 does not divide n_embd=16\n"


@pytest.mark.parametrize("more", [(), ("--eval_only=True",)])
def test_a_run_that_is_over_before_its_data_is_read_waits_for_it(tmp_path, monkeypatch, more):
    flags = arguments(tmp_path, "run", "--max_iters=2", *more)
    path = tmp_path / "data" / "tiny" / "val.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    digest_and_largest, say, over = integrity.digest_and_largest, TrainingLog.say, threading.Event()

    def slowly(*arguments):
        assert over.wait(60)
        return digest_and_largest(*arguments)

    def heard(log, text):
        say(log, text)
        if text.startswith("reading the rest of the data"):
            over.set()

    monkeypatch.setattr(integrity, "AT_ONCE", 0)
    monkeypatch.setattr(integrity, "digest_and_largest", slowly)
    monkeypatch.setattr(TrainingLog, "say", heard)
    with pytest.raises(UserError, match="val.bin is not what was prepared"):
        train.main(flags)
