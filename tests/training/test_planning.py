"""A run before it starts: predicted, refused where it does not fit, planned where that is asked."""

import json
from dataclasses import replace

import pytest
import torch
from several_processes import train_in_processes
from tiny_run import arguments

import train
from configurator import parse_config
from leangpt.memory.search import Budget
from leangpt.memory.units import parse_bytes
from leangpt.system.errors import UserError
from leangpt.system.host_memory import available_memory, total_memory
from leangpt.training import planning
from leangpt.training.planning import run_config
from leangpt.weights.export import export_pretrained
from model import GPT, GPTConfig

SHORT = ["--max_iters=4", "--eval_interval=4"]
HUGE = ["--n_embd=1048576", "--n_layer=2"]


@pytest.fixture
def room(monkeypatch):
    """room(bytes): so much is at hand on this machine."""

    def limit(size):
        monkeypatch.setattr(planning, "available_memory", lambda: size)

    return limit


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_it_is_allocated(tmp_path, room):
    room(10**9)
    with pytest.raises(UserError) as error:
        train.main(arguments(tmp_path, "run", *SHORT, *HUGE))
    line = str(error.value)
    assert line.startswith("this run takes ") and "of 1 GB at hand" in line and "\n" not in line
    assert error.value.status == 2 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_nearest_plan_is_named_and_fits(tmp_path, room):
    words = arguments(tmp_path, "run", *SHORT, "--n_embd=64", "--block_size=64")
    room(1000)
    with pytest.raises(UserError) as error:  # more, the more threads there are
        train.main(words)
    room(int(0.9 * parse_bytes(str(error.value).split("takes ")[1].split(" at ")[0])))
    with pytest.raises(UserError, match=r" at hand; --.* would take") as error:
        train.main(words)
    named = str(error.value).split("; ")[1].split(" would take")[0].split()
    assert parse_config(train.Settings, named)[1]
    train.main([*words, *named])


def test_memory_ignore_starts_it(tmp_path, room):
    room(1000)
    train.main(arguments(tmp_path, "run", *SHORT, "--memory=ignore"))
    assert (tmp_path / "run" / "ckpt_last.pt").exists()


def test_an_evaluation_alone_is_not_refused(tmp_path, room):
    train.main(arguments(tmp_path, "run", *SHORT))
    room(1000)
    train.main(arguments(tmp_path, "run", "--init_from=resume", "--eval_only"))


@pytest.mark.slow
def test_memory_makes_a_plan_and_runs_it(tmp_path, capsys):
    words = arguments(tmp_path, "run", *SHORT, "--memory=300KB")
    words = [w for w in words if "batch_size" not in w and "accumulation" not in w]
    config = tmp_path / "recipe.py"
    config.write_text("batch_size = 4\ngradient_accumulation_steps = 1\n")
    train.main([str(config), *words])
    out = capsys.readouterr().out
    plan = next(line for line in out.splitlines() if line.startswith("plan "))
    assert "--batch_size=" in plan and "of 300 KB at its fullest" in plan
    said = next(line for line in out.splitlines() if line.startswith("memory: predicted"))
    assert float(said.split("measured ")[1].split(" KB")[0]) <= 300
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["batch_size"] * saved["gradient_accumulation_steps"] == 4
    assert f"--batch_size={saved['batch_size']} " in plan


def test_a_policy_is_chosen_by_auto(tmp_path, capsys):
    train.main(arguments(tmp_path, "run", *SHORT, "--attention_policy=auto"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["attention_policy"] == "cache" and "plan " in capsys.readouterr().out


def test_a_resumed_run_keeps_what_it_learns_with(tmp_path, capsys):
    train.main(arguments(tmp_path, "run", *SHORT, "--optimizer_variant=adam"))
    words = arguments(tmp_path, "run", "--max_iters=6", "--init_from=resume", "--memory=600KB")
    train.main(words)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["optimizer_variant"] == "adam" and saved["batch_size"] == 4
    assert "starts fresh" not in capsys.readouterr().out


def test_predicted_is_measured(tmp_path, capsys):
    train.main(arguments(tmp_path, "run", *SHORT, "--n_embd=64", "--block_size=64"))
    out = capsys.readouterr().out
    assert "\npredicted  " in out
    line = next(line for line in out.splitlines() if line.startswith("memory: predicted"))
    assert abs(float(line.split("(")[1].split("%")[0])) <= 5


@pytest.mark.parametrize("words", (["--memory=lots"], ["--memory=900TB"]))
def test_memory_that_is_none_or_not_there(tmp_path, words):
    with pytest.raises(UserError, match="memory="):
        train.main(arguments(tmp_path, "run", *SHORT, *words))
    assert not (tmp_path / "run").exists()


def test_gradients_summed_in_few_bits_are_predicted_and_refused(tmp_path, room, capsys):
    words = arguments(tmp_path, "run", *SHORT, "--n_embd=64", "--block_size=64")
    words += ["--gradient_accumulation_steps=2", "--optimizer_variant=adamsn8"]
    words.append("--optimizer_options=gradient_bits=8")
    train.main(words)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("memory: predicted"))
    assert abs(float(line.split("(")[1].split("%")[0])) <= 2
    room(10_000)
    with pytest.raises(UserError, match="this run takes"):
        train.main(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    (["--parallel=fsdp"], pytest.param(["--context_parallel=2"], marks=pytest.mark.campaign)),
)
def test_predicted_is_measured_on_several_processes(tmp_path, capfd, flags):
    words = arguments(tmp_path, "run", *SHORT, "--n_embd=64", "--block_size=512", *flags)
    words += ["--batch_size=8", "--position=rope", "--gradient_accumulation_steps=2"]
    train_in_processes(2, words)
    out = capfd.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("memory: predicted"))
    assert abs(float(line.split("(")[1].split("%")[0])) <= 5
    with pytest.raises(Exception, match="this run takes"):
        train_in_processes(2, [*words, "--n_layer=8", "--n_embd=1048576"])


def test_the_configuration_is_that_of_the_model(tmp_path):
    flags = arguments(tmp_path, "run", "--n_layer=1", "--bias=True", "--q_chunk=8")
    settings, given = parse_config(train.Settings, flags)
    config = run_config(GPTConfig, settings, given, 21)
    assert (config.n_layer, config.bias, config.q_chunk, config.vocab_size) == (1, True, 8, 21)
    checkpoint = {"model_args": vars(GPT(replace(config, q_chunk=None)).config)}
    again = run_config(GPTConfig, replace(settings, init_from="resume"), given, None, checkpoint)
    assert again == config
    assert run_config(GPTConfig, settings, given, 50257).vocab_size == 50304


def test_memory_of_the_host_is_known():
    assert 10**8 < available_memory() <= total_memory()


def test_a_limit_of_the_process_counts(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (2**40, before[1]))
        assert available_memory() < 2**40
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_least_of_all_processes_counts():
    runtime = type("Runtime", (), {"world_size": 1, "device": torch.device("cpu")})()
    assert planning.least_of_all(runtime, 5, 7) == [5, 7]
    assert Budget(100).usable("cpu") == 98


SAYS = [
    ([], "attention  cache: the plain block, with K and V of all rows", False),
    (["--q_chunk=4"], "attention  cache: tiles of 4 rows, keys 4 at a time; a layer's input", True),
    (["--attention_policy=recompute"], "attention  recompute, but 16 tokens are too few", False),
    (["--attention_policy=recompute", "--q_chunk=4"], "attention  recompute: tiles of 4", True),
    (["--checkpoint_layers"], "each layer's input alone is kept", True),
]


@pytest.mark.slow
@pytest.mark.parametrize("words, said, tiled", SAYS)
def test_the_start_says_what_really_runs(tmp_path, capsys, words, said, tiled):
    train.main(arguments(tmp_path, "run", *SHORT, *words))
    out = capsys.readouterr().out
    assert said in out and ("; plain blocks: " in out) == tiled


@pytest.mark.slow
def test_a_published_model_is_predicted_at_its_own_length(tmp_path, capsys):
    """It trains on its whole context where no block_size is given."""
    shape = dict(n_layer=2, n_head=4, n_embd=64, mlp="swiglu", norm="rmsnorm", position="rope")
    model = GPT(GPTConfig(block_size=128, vocab_size=21, n_inner=96, n_kv_head=2, **shape))
    export_pretrained(model, tmp_path / "model")
    words = arguments(tmp_path, "run", "--max_iters=3", "--eval_interval=0", "--eval_iters=1")
    words = [w for w in words if not w.startswith(("--n_", "--block_size"))]
    train.main([*words, f"--init_from={tmp_path / 'model'}"])
    out = capsys.readouterr().out
    assert "sequences of 128" in out
    line = next(line for line in out.splitlines() if line.startswith("memory: predicted"))
    assert abs(float(line.split("(")[1].split("%")[0])) <= 10


def test_more_than_is_free_is_refused(tmp_path, room):
    room(10**8)
    with pytest.raises(UserError, match="100 MB are free now"):
        train.main(arguments(tmp_path, "run", *SHORT, "--memory=1GB"))
