"""The configurator: order, types, help, config files, and one clear line for every mistake."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configurator import config_dict, describe_changes, help_text, parse_config
from leangpt.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Settings:
    """Train a model."""

    # model
    n_layer: int = 12  # transformer blocks
    k_chunk: int | None = None  # key/value tile, rows
    # training
    dropout: float = 0.0  # 0 is none
    learning_rate: float | None = None  # None: tuned
    compile: bool = True  # torch.compile
    out_dir: str = "out"  # where "#" things go
    prompt_file: str | None = None
    seq: tuple[int, ...] = (1024, 2048)  # lengths
    policy: tuple[str, ...] = ("cache",)  # what to
    print: bool = False  # print them


def parse(*argv):
    return parse_config(Settings, argv)[0]


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--n_layer=3"], "n_layer", 3),
        (["--n_layer", "3"], "n_layer", 3),
        (["--n-layer=3"], "n_layer", 3),
        (["--n_layer=3", "--n_layer=4"], "n_layer", 4),
        (["--dropout=1"], "dropout", 1.0),
        (["--dropout=1e-1"], "dropout", 0.1),
        (["--dropout", "-1"], "dropout", -1.0),
        (["--k_chunk=None"], "k_chunk", None),
        (["--k-chunk=7", "--k_chunk=none"], "k_chunk", None),
        (["--k-chunk", "7"], "k_chunk", 7),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--compile=0"], "compile", False),
        (["--compile=False"], "compile", False),
        (["--compile", "false"], "compile", False),
        (["--compile=1"], "compile", True),
        (["--print"], "print", True),
        (["--print", "--n_layer=2"], "print", True),
        (["--out_dir=a=b"], "out_dir", "a=b"),
        (["--out_dir=None"], "out_dir", "None"),
        (["--out_dir=1e3"], "out_dir", "1e3"),
        (["--prompt_file=None"], "prompt_file", None),
        (["--prompt_file=x"], "prompt_file", "x"),
        (["--seq=16,32"], "seq", (16, 32)),
        (["--seq=16"], "seq", (16,)),
        (["--policy", "cache, int4"], "policy", ("cache", "int4")),
    ],
)
def test_flags(argv, key, value):
    result = getattr(parse(*argv), key)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--n_lyer=3"], ["--n_lyer", "did you mean n_layer?"]),
        (["--zzz=3"], ["unknown setting", "--zzz"]),
        (["-n_layer=3"], ["-n_layer", "did you mean n_layer?"]),
        (["--"], ["unknown setting"]),
        (["--n_layer"], ["--n_layer needs a value"]),
        (["--n_layer", "--print"], ["--n_layer needs a value"]),
        (["--n_layer=three"], ["--n_layer=three", "expected int"]),
        (["--n_layer=3.5"], ["expected int"]),
        (["--n_layer="], ["expected int"]),
        (["--n_layer=None"], ["expected int"]),
        (["--n_layer=True"], ["expected int"]),
        (["--dropout=high"], ["expected float"]),
        (["--dropout=nan"], ["expected float"]),
        (["--k_chunk=x"], ["expected int | None"]),
        (["--compile=maybe"], ["expected bool"]),
        (["--compile=2"], ["expected bool"]),
        (["--seq=1,x"], ["expected int,..."]),
        (["missing.py"], ["no config file 'missing.py'"]),
        (["n_layer=3"], ["did you mean --n_layer=3?"]),
        (["--print", "extra"], ["no config file 'extra'"]),
        (["."], ["no config file '.'"]),
    ],
)
def test_bad_flags_are_named(argv, words):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert all(word in str(error.value) for word in words), error.value


def test_left_to_right_over_files_and_flags(tmp_path):
    (tmp_path / "a.py").write_text(
        "import math\nn_layer = 2\ndropout = 0\nseq = [8, 16]\n"
        "_half = 0.5\ndef helper(): pass\nclass C: pass\n"
    )
    (tmp_path / "b.py").write_text("n_layer = 5 * 8\n")
    a, b = str(tmp_path / "a.py"), str(tmp_path / "b.py")
    assert parse(a, "--n_layer=9").n_layer == 9
    assert parse("--n_layer=9", a).n_layer == 2
    config, given = parse_config(Settings, [a, "--compile=0", b])
    assert given == {"n_layer": 40, "dropout": 0.0, "seq": (8, 16), "compile": False}
    assert type(config.dropout) is float and config.seq == (8, 16)


@pytest.mark.parametrize(
    "text, words",
    [
        ("n_lyer = 2\nfoo = 3\n", ["n_lyer (did you mean n_layer?)", "foo", "x.py"]),
        ("n_layer = 2.0\n", ["n_layer = 2.0", "expected int"]),
        ("n_layer = True\n", ["expected int"]),
        ("n_layer = None\n", ["expected int"]),
        ("n_layer = '2'\n", ["expected int"]),
        ("compile = 1\n", ["expected bool"]),
        ("out_dir = 3\n", ["expected str"]),
        ("seq = [1, 'a']\n", ["expected int,..."]),
        ("n_layer = \n", ["line 1", "syntax"]),
        ("\nn_layer = depth\n", ["line 2", "NameError", "depth"]),
        ("import no_such_module\n", ["line 1", "no_such_module"]),
        ("dropout = float('nan')\n", ["dropout = nan", "expected float"]),
        ("seq = [1, float('nan')]\n", ["seq = [1, nan]", "expected int,..."]),
        ("n_layer: 2\n", ["n_layer is given no value", "max_iters = 3"]),  # YAML
        ("dropout = 0.1\nn_layer: int\n", ["n_layer is given no value"]),
        ('{"n_layer": 2}\n', ["nothing is set"]),  # JSON
        ("'n_layer=2'\n", ["nothing is set"]),
    ],
)
def test_bad_config_files_are_named(tmp_path, text, words):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError) as error:
        parse(str(tmp_path / "x.py"))
    assert all(word in str(error.value) for word in words), error.value


def test_a_config_file_of_comments_changes_nothing(tmp_path):
    (tmp_path / "x.py").write_text("# n_layer = 2\n")
    assert parse(str(tmp_path / "x.py")) == Settings()
    (tmp_path / "x.py").write_text("n_layer: int = 2\n")
    assert parse(str(tmp_path / "x.py")).n_layer == 2


def test_config_files_do_not_see_one_another(tmp_path):
    (tmp_path / "a.py").write_text("n_layer = 2\n")
    (tmp_path / "b.py").write_text("n_layer = n_layer + 1\n")
    with pytest.raises(UserError, match="NameError"):
        parse(str(tmp_path / "a.py"), str(tmp_path / "b.py"))


def test_help_lists_every_key_type_default_and_comment():
    text = help_text(Settings)
    assert "Train a model." in text and "\nmodel\n" in text and "\ntraining\n" in text
    for line in (
        "--n_layer: int = 12 transformer blocks",
        "--k_chunk: int | None = None",
        "--dropout: float = 0.0 0 is none",
        "--compile: bool = True torch.compile",
        "--out_dir: str = 'out' where \"#\" things go",
        "--prompt_file: str | None = None",
        "--seq: int,... = (1024, 2048) lengths",
    ):
        assert line in " ".join(text.split())


def test_words_are_gathered_where_a_field_asks_for_them():
    @dataclass
    class Folders:
        runs: tuple[str, ...] = field(default=(), metadata={"positional": True})
        out: str = "picture"

    config, given = parse_config(Folders, ["a", "--out", "b", "c,d", "model.py"])
    assert (config.runs, config.out) == (("a", "c,d", "model.py"), "b")
    assert set(given) == {"runs", "out"}
    assert "RUNS ... [--key=value ...]" in help_text(Folders)
    assert "[CONFIG.py ...]" in help_text(Settings)


def test_changes_and_plain_values():
    assert describe_changes(Settings()) == "all settings at their defaults"
    config = parse("--n_layer=3", "--seq=8", "--compile=1")
    assert describe_changes(config) == "n_layer=3 (12), seq=(8,) ((1024, 2048))"
    assert json.loads(json.dumps(config_dict(config))) == config_dict(config)
    assert config_dict(config)["seq"] == [8]


SCRIPT = '''
"""Count blocks."""
import sys
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from configurator import parse_config
from leangpt.system.errors import exit_cleanly

@dataclass
class Settings:
    n_layer: int = 12  # blocks

exit_cleanly(lambda: print(parse_config(Settings)[0]))
'''


@pytest.mark.parametrize(
    "argv, status, out, err",
    [
        (["--n_layer=3"], 0, "Settings(n_layer=3)\n", ""),
        (["--n_layer=x"], 2, "", "error: --n_layer=x: expected int\n"),
        (
            ["--help"],
            0,
            "usage: python script.py [CONFIG.py ...] [--key=value ...]\n\n"
            "Count blocks.\n\n  --n_layer: int = 12                       blocks\n",
            "",
        ),
    ],
)
def test_a_script_exits_with_one_clear_line(tmp_path, argv, status, out, err):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), *argv], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


# What nanoGPT's shipped config files set.
NANOGPT = {
    "train_shakespeare_char": """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
""",
    "train_gpt2": """
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    "finetune_shakespeare": """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
    "eval_gpt2": """
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = 'gpt2'
""",
}


@pytest.fixture(scope="module")
def train_settings():
    return pytest.importorskip("train").Settings


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpt_config_files_load(tmp_path, name, train_settings):
    path = tmp_path / f"{name}.py"
    path.write_text(NANOGPT[name])
    config, given = parse_config(train_settings, [str(path)])
    assert len(given) == NANOGPT[name].count("=") and config.batch_size == given.get(
        "batch_size", config.batch_size
    )


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.stem)
def test_our_config_files_load(path, train_settings):
    _, given = parse_config(train_settings, [str(path)])
    assert given


def test_the_seeds_setup(train_settings):
    """Learning rates are the optimizers' own, tuned for this very setup."""
    config, given = parse_config(train_settings, [str(ROOT / "config/train_shakespeare_char.py")])
    shape = (config.n_layer, config.n_head, config.n_embd, config.block_size, config.batch_size)
    assert shape == (4, 4, 128, 64, 12) and config.max_iters == 2000
    assert (config.device, config.dtype, config.optimizer_variant) == ("auto", "auto", "adam")
    assert not {"learning_rate", "min_lr", "embedding_lr", "optimizer_options"} & set(given)


@pytest.mark.parametrize("fast, dtype", [(True, "bfloat16"), (False, "auto")])
def test_the_demo_takes_bfloat16_where_the_processor_is_fast(
    monkeypatch, train_settings, fast, dtype
):
    monkeypatch.setattr("leangpt.system.processor.fast_bfloat16", lambda: fast)
    config, _ = parse_config(train_settings, [str(ROOT / "config/demo_shakespeare_char.py")])
    assert (config.dtype, config.max_iters) == (dtype, 500)
