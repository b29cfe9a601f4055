"""What people type: the seeds' own commands, every order and spelling, and lines drawn at random.

Each is understood or ends in one line that names what was wrong.
"""

import dataclasses
import random
import string
import sys

import pytest
from tiny_run import ROOT, arguments

import bench
import plan
import sample
import train
from configurator import parse_config
from leangpt.system.errors import RunError, UserError, exit_cleanly, named_as_typed

CONFIG = str(ROOT / "config/train_shakespeare_char.py")


def parse(page, line):
    return parse_config(page.Settings, line.split())[0]


# ------------------------------------------------------------------ understood


def test_the_seeds_commands():
    settings = parse(bench, "--seq 1024 4096 --runs 3 --print")
    assert (settings.seq, settings.runs, settings.print) == ((1024, 4096), 3, True)
    settings = parse(
        bench, "--k-chunk 256 --q-chunk 64 128 --kv-heads 2 --policy recompute cache --seq=16"
    )
    assert (settings.k_chunk, settings.q_chunk, settings.kv_heads) == ((256,), (64, 128), 2)
    assert (settings.policy, settings.seq) == (("recompute", "cache"), (16,))
    settings = parse(
        train,
        f"{CONFIG} --optimizer_variant adamsn --policy recompute --k-chunk 256 --q-chunk 64 "
        "--kv-heads 2 --compile 0",
    )
    assert (settings.optimizer_variant, settings.attention_policy) == ("adamsn", "recompute")
    assert (settings.k_chunk, settings.q_chunk, settings.n_kv_head) == (256, 64, 2)
    assert (settings.compile, settings.n_embd) == (False, 128)
    settings = parse(
        sample, "--out_dir out-shakespeare-char --num_samples 2 --policy cache --stream"
    )
    assert (settings.num_samples, settings.attention_policy, settings.stream) == (2, "cache", True)
    settings = parse(sample, "--k-chunk 256 --q-chunk 64 --kv-heads 2 --policy recompute")
    assert (settings.k_chunk, settings.q_chunk, settings.n_kv_head) == (256, 64, 2)


@pytest.mark.parametrize(
    "flags", ["--compile --learning_rate 1e-3", "--learning-rate=1e-3 --compile"]
)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_config_file_may_stand_anywhere(flags, place):
    words = flags.split()
    if words[place - 1 : place] == ["--learning_rate"]:
        pytest.skip("there it would be the value")
    settings, given = parse_config(train.Settings, [*words[:place], CONFIG, *words[place:]])
    assert (settings.n_layer, settings.compile, settings.learning_rate) == (4, True, 1e-3)


@pytest.mark.parametrize(
    "line",
    [
        "--seq 16 32 {} --runs 3",
        "--seq=16,32 {} --runs=3",
        "--seq 16, 32 --runs 3 {}",
        "--seq=16 32 --runs 3 {}",
        "{} --runs 3 --seq 16,32",
        "--print {} --runs 3 --seq 16 32",
    ],
)
def test_lists_by_spaces_or_commas_end_at_flags_and_config_files(tmp_path, line):
    (tmp_path / "x.py").write_text("heads = 2\n")
    settings = parse(bench, line.format(tmp_path / "x.py"))
    assert (settings.seq, settings.runs, settings.heads) == ((16, 32), 3, 2)


@pytest.mark.parametrize(
    "text, says",
    [
        ("raise SystemExit(0)", "x.py, line 1: SystemExit: 0"),
        ("import sys\nsys.exit('no')", "x.py, line 2: SystemExit: no"),
        ("kv_heads = 2\nn_kv_head = 1", "kv_heads and n_kv_head are one setting"),
        ("for i in range(3): n_layer = i", "unknown setting in .*: i; .* begin with _"),
    ],
)
def test_config_files_that_do_something_else(tmp_path, text, says):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError, match=says):
        parse_config(train.Settings, [str(tmp_path / "x.py")])
    with pytest.raises(UserError, match="no config file '.*': it is a folder, give a file in it"):
        parse_config(train.Settings, [str(tmp_path)])


def test_names_that_two_pages_share_work_in_config_files_too(tmp_path):
    (tmp_path / "x.py").write_text("policy = 'recompute'\nkv_heads = 2\n")
    settings, given = parse_config(train.Settings, [str(tmp_path / "x.py")])
    assert given == {"attention_policy": "recompute", "n_kv_head": 2}


NANOGPTS_KEYS = {  # of its three scripts, as of its last commit, with other values than its own
    train: "out_dir=x eval_interval=1 log_interval=2 eval_iters=3 eval_only=True "
    "always_save_checkpoint=False init_from=gpt2-xl wandb_log=True wandb_project=x "
    "wandb_run_name=x dataset=x gradient_accumulation_steps=1 batch_size=1 block_size=8 n_layer=1 "
    "n_head=1 n_embd=8 dropout=0.1 bias=True learning_rate=1e-3 max_iters=5 weight_decay=0.2 "
    "beta1=0.8 beta2=0.9 grad_clip=0.5 decay_lr=False warmup_iters=3 lr_decay_iters=4 min_lr=1e-4 "
    "backend=gloo device=mps dtype=float16 compile=False",
    sample: "init_from=gpt2 out_dir=x start=FILE:x num_samples=2 max_new_tokens=3 temperature=0.1 "
    "top_k=3 seed=1 device=cuda:1 dtype=bfloat16 compile=False",
    bench: "batch_size=2 block_size=64 bias=False real_data=False seed=3 device=cpu "
    "dtype=bfloat16 compile=False profile=False",
}


@pytest.mark.parametrize("page", NANOGPTS_KEYS, ids=lambda page: page.__name__)
def test_nanogpts_keys_are_known(page):
    for word in NANOGPTS_KEYS[page].split():
        settings, given = parse_config(page.Settings, [f"--{word}"])
        assert len(given) == 1


@pytest.mark.parametrize(
    "page, word",
    [(sample, "compile"), *((bench, w) for w in ("bias", "real_data", "compile", "profile"))],
)
def test_what_nanogpt_has_and_we_do_not_is_refused_with_the_reason(page, word, tmp_path):
    with pytest.raises(UserError, match=f"^{word}=True is not done here: .*--{word}=False"):
        parse(page, f"--{word}")
    (tmp_path / "x.py").write_text(f"{word} = True\n")
    with pytest.raises(UserError, match=f"^{word}=True is not done here"):
        parse(page, str(tmp_path / "x.py"))


def test_a_config_file_that_overrules_a_flag_before_it_is_said(tmp_path, capsys):
    (tmp_path / "x.py").write_text("n_layer = 4\nkv_heads = 2\nn_embd = 64\n")
    file = str(tmp_path / "x.py")
    line = ["--n-layer", "3", "--n_kv_head=1", "--n_embd=64", file, "--n_layer=5"]
    settings, _ = parse_config(train.Settings, line)
    assert (settings.n_layer, settings.n_kv_head) == (5, 2)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"note: {file} comes after {what}: flags after the file have the last word"
        for what in ("--n-layer=3 and sets 4", "--n_kv_head=1 and sets 2")
    ]


# ------------------------------------------------------------------ named


@pytest.mark.parametrize(
    "page, line, says",
    [
        (
            train,
            "config/train_shakespear_char.py",
            "did you mean config/train_shakespeare_char.py?",
        ),
        (train, "train_shakespeare_char", "did you mean config/train_shakespeare_char.py?"),
        (train, "--start hello", "unknown setting on the command line: --start"),
        (train, "--n_layers 3", "did you mean n_layer?"),
        (train, "--polcy recompute", "did you mean policy?"),
        (sample, "--start once upon", "no config file 'upon': .* a value with spaces needs quotes"),
        (train, "--n_layer = 3", "write --n_layer=VALUE, without spaces"),
        (train, "--out_dir=", "--out_dir is empty: give it a value"),
        (train, "--policy=", "--policy is empty"),
        (train, "--dataset= --n_layer=2", "--dataset is empty"),
        (sample, "--init_from=", "--init_from is empty"),
        (plan, "--memory=", "--memory is empty"),
        (bench, "--seq", "--seq needs a value"),
        (bench, "--seq config/x.py", "--seq needs a value"),
        (bench, "--seq --print", "--seq needs a value"),
        (bench, "--seq 1024 4o96", "--seq=1024,4o96: expected int"),
        (bench, "--seq 16 config/x.py", "no config file 'config/x.py'"),
        (bench, "--timeout=1e300", "--timeout must be at most 2,000,000 seconds, not 1e.300"),
        (train, f"--seed={'9' * 30}", "too large, at most 9,223,372,036,854,775,807"),
        (train, f"--seed=-{'9' * 30}", "too large"),
        (train, f"--seed={'9' * 6000}", r"9\.\.\. \(6,000 characters\): expected int"),
        (train, f"--block_size={'9' * 30}", "too large"),
        (train, "--batch_size=9223372036854775807", "batch_size must be at most 2,147,483,647"),
        (train, "--batch_size=2147483647", "a micro-batch has at most 134,217,728 tokens"),
        (train, "--n_layer=9223372036854775807", "n_layer must be at most"),
        (train, "--learning_rate=1e400", "too large, at most 1.8e.308"),
        (train, "--learning_rate=-inf", "too large"),
        (train, f"--{'x' * 6000}=1", r"x\.\.\. \(6,002 characters\)"),
        (train, "x" * 6000, r"no config file 'x*\.\.\. \(6,000 characters\)'"),
    ],
)
def test_what_is_wrong_is_named(monkeypatch, page, line, says):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=says) as caught:
        settings = parse(page, line)
        if page is bench:
            bench.grid(settings)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text, says", [("seed = 10**30", "too large"), ("seq = [2**64]", "too lar")]
)
def test_numbers_in_config_files_have_limits_too(tmp_path, text, says):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError, match=says):
        parse(train if "seed" in text else bench, str(tmp_path / "x.py"))


def test_prepare_scripts_take_no_config_files(tmp_path):
    (tmp_path / "b.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(UserError, match="unexpected '.*b.py' after --dataset: "):
        parse_config(train.Settings, ["--dataset", "a.py", str(tmp_path / "b.py")], False)


def test_prepare_scripts_take_one_value_for_each_key():
    with pytest.raises(UserError, match="--dataset is given twice: it takes one value"):
        parse_config(train.Settings, ["--dataset=a", "--dataset", "b"], False)
    assert parse_config(train.Settings, ["--dataset=a", "--dataset=a"], False)[0].dataset == "a"
    assert parse_config(train.Settings, ["--dataset=a", "--dataset=b"])[0].dataset == "b"


ALIASES = [  # (page, its own name of a setting, the other one)
    (page, field.name, field.metadata["alias"])
    for page in (train, sample, bench, plan)
    for field in dataclasses.fields(page.Settings)
    if "alias" in field.metadata
]


@pytest.mark.parametrize("page, key, alias", ALIASES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("typed", [0, 1], ids=["key", "alias"])
def test_an_error_names_a_setting_as_it_was_typed(tmp_path, page, key, alias, typed):
    name, value = (key, alias)[typed], {"purpose": "sample"}.get(key, "3")
    in_a_file = repr(value if key in ("purpose", "attention_policy") else 3)
    if page is bench and key in ("seq", "policy"):
        in_a_file = {"seq": "[3]", "policy": "['3']"}[key]
    (tmp_path / "x.py").write_text(f"{name} = {in_a_file}\n")
    lines = [[f"--{name.replace('_', '-')}", value], [str(tmp_path / "x.py")]]
    for argv in lines[: 1 if name == "for" else 2]:  # no name in Python
        _, given = parse_config(page.Settings, argv)
        with pytest.raises(UserError) as caught, named_as_typed(given.typed):
            raise RunError(f"{key}=3 is wrong, --{key} too, not {key}s or /{key}/x")
        assert str(caught.value) == f"{name}=3 is wrong, --{name} too, not {key}s or /{key}/x"
        assert caught.value.status == 1


@pytest.mark.parametrize(
    "page, line, says",
    [
        (bench, "--n_kv_head 3", "^n_kv_head=3 does not divide heads=8$"),
        (bench, "--n-head=25", "^n_head=25 does not divide d_model=256$"),
        (bench, "--heads=25 --n_embd 128", "^heads=25 does not divide n_embd=128$"),
        (bench, "--attention_policy x", "^unknown attention_policy 'x'"),
        (bench, "--block_size 0", "^--block_size must be positive"),
        (plan, "--for x", "^unknown for 'x'"),
        (plan, "--purpose x", "^unknown purpose 'x'"),
        (plan, "--for=sample --goal=largest", "^for=sample plans the model"),
        (plan, "--vocab_size=65 --kv-heads=5", "^kv_heads=5 does not divide n_head=12"),
        (plan, "--vocab_size=65 --n_kv_head=5", "^n_kv_head=5 does not divide n_head=12"),
        (plan, "--vocab_size=65 --policy=x", "^unknown policy 'x'"),
    ],
)
def test_errors_of_pages_name_what_was_typed(monkeypatch, page, line, says):
    monkeypatch.setattr(sys, "argv", ["page", *line.split()])
    with pytest.raises(UserError, match=says):
        page.main()


def test_training_and_sampling_name_what_was_typed(tmp_path):
    base = arguments(tmp_path, "run", "--max_iters=1", "--n_head=4")
    with pytest.raises(UserError, match="^kv_heads=3 does not divide n_head=4"):
        train.main([*base, "--kv-heads", "3"])
    train.main(base)
    with pytest.raises(UserError, match="^policy='grouped' needs weights"):
        sample.main([f"--out_dir={tmp_path / 'run'}", "--policy=grouped"])


# ------------------------------------------------------------------ drawn at random

STRANGE = (
    *("", " ", "0", "-1", "1", "3", "0.5", "-0.0", "1e-320", "1e400", "-1e400", "nan", "inf"),
    *("None", "True", "no", "x", "1,2", "1, x", ",", "--", "=", "a=b", "../..", "/dev/null/x"),
    *("9" * 30, "9" * 5000, str(2**63 - 1), str(-(2**63)), "x" * 300, "x" * 5000, "é"),
    *("0x10", "1_000", "１２", "[1]", "{", "%s", "\n", "$HOME"),
)


def random_line(choose, names):
    """A few words such as a person, or a script gone wrong, may type."""
    words = []
    for _ in range(choose.randint(1, 2)):
        key, value = choose.choice(names), choose.choice(STRANGE)
        if choose.random() < 0.1:
            key = "".join(choose.choices(string.printable, k=choose.randint(0, 8)))
        dashes = choose.choice(["--", "--", "--", "--", "-", ""])
        words += choose.choice(
            [[f"{dashes}{key}={value}"], [f"{dashes}{key}", value], [f"{dashes}{key}"], [value]]
        )
    return words


def outcome(main, capsys):
    """(exit status, lines on stderr) of a script's main, as its process would end."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        exit_cleanly(main)
        raise SystemExit(0)
    return ended.value.code or 0, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("page", [train, sample, bench], ids=lambda page: page.__name__)
def test_any_words_are_understood_or_refused_in_one_line(page, capsys):
    choose = random.Random(0)
    names = list(vars(page.Settings()))
    statuses = []
    for _ in range(400):
        words = random_line(choose, names)
        status, errors = outcome(lambda: parse_config(page.Settings, words), capsys)  # noqa: B023
        assert (status, len(errors)) in ((0, 0), (2, 1)), (words, errors)
        statuses.append(status)
    assert 20 < statuses.count(0) < 380


# Settings whose strange values decide nothing before a run begins, or that no test should try.
LEFT_OUT = {"compile", "init_from", "max_iters", "eval_iters", "wandb_log", "tensorboard_log"}
LEFT_OUT |= {"gradient_accumulation_steps", "data_dir", "n_layer"}


@pytest.mark.slow
def test_runs_begin_or_end_in_one_line(tmp_path, capsys, monkeypatch):
    """train.py itself, from command line to last word, with one or two strange settings."""
    monkeypatch.chdir(tmp_path)  # where out_dir=x goes
    base = arguments(tmp_path, "run", "--max_iters=1", "--eval_iters=1", "--overwrite=True")
    choose = random.Random(1)
    names = sorted(set(vars(train.Settings())) - LEFT_OUT)
    statuses = []
    for _ in range(150):
        strange = [
            f"--{choose.choice(names)}={choose.choice(STRANGE)}"
            for _ in range(choose.randint(1, 2))
        ]
        status, errors = outcome(lambda: train.main([*base, *strange]), capsys)  # noqa: B023
        assert status in (0, 1, 2) and len(errors) == (status != 0), (strange, errors)
        statuses.append(status)
    assert min(map(statuses.count, (0, 2))) > 5
