"""plan.py as it is typed: what it answers is what train.py and sample.py take, and it is true."""

import json
import shlex
import time

import psutil
import pytest
from tiny_run import arguments

import plan
import sample
import train
from configurator import parse_config
from leangpt.system.errors import UserError

GPT2 = ["config/train_gpt2.py"]
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "hidden_act": "silu",
}  # fmt: skip


def answer(capsys, *words):
    plan.main(list(words))
    return capsys.readouterr().out


def flags_of(said):
    """The flags of each plan."""
    lines = [line for line in said.splitlines() if line.startswith("flags ")]
    return [shlex.split(line.removeprefix("flags")) for line in lines]


@pytest.mark.slow
def test_a_complete_config_is_told_whether_it_fits(capsys):
    said = answer(capsys, *GPT2, "--memory=24GB")
    assert "as asked   fits: " in said and "124,373,760 parameters" in said
    for part in ("saved", "state", "loss", "weights", "gradients", "context"):
        assert f" {part} " in said
    assert said.splitlines()[-1].startswith("python train.py config/train_gpt2.py --batch_size=")
    said = answer(capsys, *GPT2, "--memory=4GB")
    assert "as asked   does not fit: " in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "goal, family", [("fastest", ""), ("longest", ""), ("largest", "gpt2"), ("largest", "llama")]
)
def test_flags_are_train_pys(capsys, goal, family):
    words = [f"--family={family}"] if goal == "largest" else []
    said = answer(capsys, *GPT2, "--memory=12GB", f"--goal={goal}", *words)
    plans = flags_of(said)
    assert 1 <= len(plans) <= 5
    for flags in plans:
        parse_config(train.Settings, flags)
    parse_config(train.Settings, shlex.split(said.splitlines()[-1])[2:])
    assert ("fastest's time" in said) == (goal != "longest")


def test_what_is_given_stays(capsys):
    said = answer(capsys, *GPT2, "--memory=6GB", "--optimizer_variant=adam", "--batch_size=4")
    for flags in flags_of(said):
        assert not any(f.startswith("--optimizer_variant") for f in flags)
        assert "--batch_size=4" in flags


def test_several_gpus_share_the_batch(capsys):
    said = answer(capsys, *GPT2, "--memory=24GB", "--devices=4")
    assert said.splitlines()[-1].startswith("torchrun --standalone --nproc_per_node=4 train.py")
    first = parse_config(train.Settings, flags_of(said)[0])[0]
    assert first.batch_size * first.gradient_accumulation_steps == 480
    assert first.gradient_accumulation_steps % 4 == 0


def test_gpus_that_are_too_small_for_all_weights_share_them(capsys):
    large = ["--n_layer=48", "--n_head=25", "--n_embd=1600"]
    said = answer(capsys, *GPT2, *large, "--memory=24GB", "--devices=4")
    assert "as asked   does not fit" in said and "weights gathered block by block" in said
    first = parse_config(train.Settings, flags_of(said)[0])[0]
    assert first.parallel == "fsdp" and first.optimizer_variant == "adam"
    assert "--parallel=fsdp" in said.splitlines()[-1]
    with pytest.raises(UserError, match="no plan fits 24 GB"):
        answer(capsys, *GPT2, *large, "--memory=24GB", "--devices=4", "--parallel=ddp")


@pytest.mark.slow
def test_pieces_of_a_sequence_make_it_longer(capsys):
    def longest(*flags):
        said = answer(capsys, "--position=rope", "--memory=8GB", "--goal=longest", *flags)
        return parse_config(train.Settings, flags_of(said)[0])[0]

    one, four = longest(), longest("--devices=4")
    assert four.context_parallel == 4 and four.block_size > 2.5 * one.block_size
    whole = longest("--devices=4", "--context_parallel=1")
    assert whole.context_parallel == 1 and whole.block_size < four.block_size / 2


def test_one_long_sequence_is_cut_for_several_gpus(capsys):
    one = ["--batch_size=1", "--gradient_accumulation_steps=1", "--position=rope"]
    said = answer(capsys, "--memory=24GB", "--devices=4", "--block_size=65536", *one)
    assert "fewer than the devices: each in pieces on 4 of them" in said
    assert "--context_parallel=4" in said.splitlines()[-1]


def test_tokens_an_iteration(capsys):
    said = answer(capsys, *GPT2, "--memory=24GB", "--tokens_per_iteration=65536")
    first = parse_config(train.Settings, flags_of(said)[0])[0]
    assert first.batch_size * first.gradient_accumulation_steps == 64
    words = ["--tokens_per_iteration=65536", "--batch_size=4"]
    first = parse_config(train.Settings, flags_of(answer(capsys, "--memory=24GB", *words))[0])[0]
    assert (first.batch_size, first.gradient_accumulation_steps) == (4, 16)


@pytest.mark.slow
@pytest.mark.parametrize("goal", ("", "--goal=longest", "--goal=largest"))
def test_it_is_quick_and_takes_nothing(capsys, goal):
    shape = ["--n_layer=80", "--n_head=64", "--n_embd=8192", "--memory=80GB"]
    before, began = psutil.Process().memory_info().rss, time.process_time()
    if goal == "--goal=largest":
        answer(capsys, "--memory=80GB", "--block_size=8192", goal)
    else:
        with pytest.raises(UserError, match="the least that this model takes is [12][0-9]+ GB"):
            plan.main([*shape, *filter(None, [goal])])
    assert time.process_time() - began < 8  # two seconds where nothing else runs
    assert psutil.Process().memory_info().rss - before < 200e6


@pytest.mark.slow
def test_the_command_it_ends_with_runs_and_keeps_its_word(tmp_path, capsys):
    flags = arguments(tmp_path, "run", "--max_iters=4", "--eval_interval=4", "--n_embd=32")
    said = answer(capsys, *flags, "--device=cpu", "--memory=650KB")
    assert "as asked   does not fit" in said
    train.main(shlex.split(said.splitlines()[-1])[2:])
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("memory: predicted"))
    measured = float(line.split("measured ")[1].split(" KB")[0])
    assert measured <= 650


@pytest.mark.parametrize("goal", ("", "--goal=longest"))
def test_plans_to_decode_are_sample_pys(capsys, goal):
    words = ["--for=sample", "--memory=8GB", "--n_layer=36", "--n_head=20", "--n_embd=1280"]
    words += ["--position=rope", goal or "--block_size=32768"]
    said = answer(capsys, *words)
    plans = flags_of(said)
    assert 1 <= len(plans) <= 5
    for flags in plans:
        parse_config(sample.Settings, flags)
    assert "the longest context" in said and "gives up" in said


@pytest.mark.slow
def test_a_run_of_ours_is_planned_from_its_checkpoint(tmp_path, capsys):
    flags = arguments(tmp_path, "run", "--max_iters=2", "--eval_interval=2", "--n_layer=1")
    train.main([*flags, "--optimizer_variant=muonsn8"])
    capsys.readouterr()
    said = answer(capsys, *flags, "--init_from=resume", "--device=cpu", "--memory=10MB")
    assert "1 layers" in said and not any("optimizer_variant" in f for f in flags_of(said)[0])


FEW_BITS = "--optimizer_options=gradient_bits=8"
ONE_EACH = ["--batch_size=480", "--gradient_accumulation_steps=1", "--context_parallel=1"]
INSIDE = "--optimizer_options=fused_backward=True"
BAD = [
    (["--memory=24cows"], "write bytes as 24GB"),
    (["--memory=0"], "that is no memory"),
    (["--memory=24GB", "--goal=best"], "unknown goal 'best'"),
    (["--memory=24GB", "--for=fun"], "unknown for 'fun'"),
    (["--memory=24GB", "--family=bert"], "unknown family 'bert'"),
    (["--memory=24GB", "--devices=0"], "devices must be positive"),
    (["--memory=24GB", "--device=tpu"], "plans are made for cpu and cuda"),
    (["--memory=24GB", "--tokens_per_iteration=1000"], "not a whole number of sequences"),
    (["--memory=24GB", "--host_memory=lots"], "host_memory=lots: write bytes"),
    (["--memory=24GB", "--parallel=fsdp"], "parallel=fsdp is not for --devices=1"),
    (["--memory=24GB", "--devices=2", "--parallel=none"], "none is not for --devices=2"),
    (["--memory=24GB", "--parallel=twice"], "unknown parallel='twice'; choose one of"),
    (
        ["--memory=24GB", "--devices=4", "--context_parallel=3"],
        "context_parallel=3 must divide the processes, of which --devices=4",
    ),
    (["--memory=24GB", "--devices=481", *ONE_EACH], "cannot be shared out among 481"),
    (["--memory=24GB", "--optimizer_options=gradient_bits=8"], "adam cannot sum gradients"),
    (
        ["--memory=24GB", "--optimizer_variant=muonsn8", "--optimizer_options=gradient_bits=5"],
        "gradient_bits must be 8 or 4, not 5",
    ),
    (
        ["--memory=9GB", "--devices=2", "--optimizer_variant=muonsn8", FEW_BITS],
        "gradient_bits runs on one process",
    ),
    (
        ["--memory=9GB", "--batch_size=2", "--optimizer_variant=muonsn8", INSIDE],
        "needs gradient_accumulation_steps=1",
    ),
    (["--memory=24GB", "--init_from=no/such_folder/here"], "no such folder"),
    (["--memory=1MB"], "no plan fits 1 MB: the least that this model takes is"),
    (["--memory=2GB", "--n_embd=8192", "--n_layer=64", "--n_head=64"], "that would fit is 124M"),
    (["--memory=24GB", "--n_head=7"], "does not divide"),
    (["--memory=1MB", "--for=sample"], "nothing fits 1 MB"),
    (["--memory=24GB", "--for=sample", "--kv_bits=3"], "kv_bits=3"),
    (["--memory=24GB", "--kv_bits=4"], "kv_bits: for plans with --for=sample alone"),
    (["--memory=24GB", "--family=llama"], "family: for plans with --goal=largest alone"),
    (["--memory=24GB", "--for=sample", "--devices=2"], "devices: for plans with --for=train"),
    (["--memory=24GB", "--for=sample", "--goal=largest"], "plans the model it is given"),
    (["--memory=24GB", "--goal=largest", "--n_layer=3"], "goal=largest chooses n_layer"),
    (["--memory=24GB", "--goal=longest", "--block_size=99"], "goal=longest chooses block_size"),
    (["--memory=24GB", "--goal=longest", "--batch_size=2"], "goal=longest chooses batch_size"),
    (
        ["--memory=24GB", "--goal=largest", "--family=llama", "--vocab_size=5"],
        "has its own vocabularies",
    ),
    (
        ["--memory=24GB", "--batch_size=7", "--tokens_per_iteration=65536"],
        "whole number of micro-batches of block_size=1024 x batch_size=7",
    ),
    (
        ["--memory=24GB", "--gradient_accumulation_steps=7", "--tokens_per_iteration=65536"],
        "chooses gradient_accumulation_steps",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("words, message", BAD)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        plan.main(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ("hidden_size", "num_hidden_layers", "vocab_size"))
def test_a_model_folder_that_lacks_a_key(tmp_path, missing):
    config = dict(LLAMA)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    plan.main([f"--init_from={folder}", "--memory=2GB"])  # its weights need not be there
    del config[missing]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=missing):
        plan.main([f"--init_from={folder}", "--memory=2GB"])


def llama_folder(folder, **more):
    """A folder of config.json alone."""
    folder.mkdir()
    config = LLAMA | more
    (folder / "config.json").write_text(json.dumps(config))
    return f"--init_from={folder}"


def test_a_published_model_keeps_its_context(tmp_path, capsys):
    """Its own length where none is given, as train.py takes it; no plan beyond its positions."""
    words = [llama_folder(tmp_path / "llama"), "--memory=2GB", "--batch_size=1", "--device=cpu"]
    said = answer(capsys, *words)
    assert "block 512" in said
    longer = answer(capsys, *words, "--block_size=2048")
    peaks = [float(s.split("fits: ")[1].split(" MB")[0]) for s in (said, longer)]
    assert 2 < peaks[1] / peaks[0] < 6
    words = ["--memory=2GB", "--goal=longest"]
    window = llama_folder(tmp_path / "window", model_type="mistral", sliding_window=1024)
    assert "plan 1     1,024 tokens" in answer(capsys, window, *words)
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    shape = dict(n_layer=2, n_head=2, n_embd=32, n_positions=128, n_ctx=128, vocab_size=100)
    (gpt2 / "config.json").write_text(json.dumps(dict(model_type="gpt2", **shape)))
    assert "plan 1     128 tokens" in answer(capsys, f"--init_from={gpt2}", *words)


def test_auto_is_scratch_where_there_is_no_run(tmp_path, capsys):
    words = [f"--out_dir={tmp_path}", "--init_from=auto", "--memory=24GB"]
    assert "124,373,760 parameters" in answer(capsys, *words)
    with pytest.raises(UserError):
        plan.main([f"--out_dir={tmp_path}", "--init_from=resume", "--memory=24GB"])


def test_a_command_ends_a_plan_to_decode(capsys):
    said = answer(capsys, "--for=sample", "--memory=8GB", "--out_dir=out-x")
    command = shlex.split(said.splitlines()[-1])
    assert command[:2] == ["python", "sample.py"] and "--out_dir=out-x" in command
    parse_config(sample.Settings, command[2:])


@pytest.mark.parametrize("memory, free", [("4GB", "384 MB"), ("24GB", "1.2 GB")])
def test_it_says_what_stays_free(capsys, memory, free):
    assert f"{memory[:-2]} GB of a GPU; {free} stay free" in answer(capsys, f"--memory={memory}")
