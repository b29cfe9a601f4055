"""Every numeric setting of every page with numbers that nobody should give: negative, zero, huge,
not a number. Each run begins, or ends in one line with exit status 2 and nothing written."""

import sys
import typing

import pytest
from test_command_lines import outcome
from test_sample import CHARACTERS, save
from tiny_run import arguments

import bench
import plan
import sample
import train
from configurator import parse_config

NUMBERS = ["-1", "0", "-0.0", "1e-320", "0.5", "3", "65535", str(2**31), str(2**63 - 1)]
NUMBERS += [str(-(2**63)), "9" * 30, "1e30", "1e308", "1e400", "nan", "inf", "-inf", "None", ""]
# what is right, but takes long, or ends a run that has begun
ENDLESS = {"num_samples": ["65535"], "max_new_tokens": ["65535"], "n_layer": ["65535"]}


def numeric(page):
    """Names of a page's settings that are numbers, or lists of them."""
    for name, kind in typing.get_type_hints(page.Settings).items():
        kinds = {k for option in (kind, *typing.get_args(kind)) for k in typing.get_args(option)}
        if {kind, *typing.get_args(kind), *kinds} & {int, float}:
            yield name


def cases(page):
    for name in numeric(page):
        for number in NUMBERS:
            if number not in ENDLESS.get(name, ()):
                yield f"--{name}={number}"


def holds(main, flag, folder, capsys):
    """Does the page begin, or refuse in one line, having written nothing? -> its exit status."""
    before = sorted(folder.rglob("*"))
    status, errors = outcome(main, capsys)
    assert status in (0, 2), (flag, status, errors)
    if status == 2:
        assert len(errors) == 1 and errors[0].startswith("error: "), (flag, errors)
        assert sorted(folder.rglob("*")) == before, flag
    return status


def test_the_numbers_are_found():
    assert {"learning_rate", "n_layer", "beta1", "q_chunk"} <= {*numeric(train)}
    assert {"temperature", "kv_bits", "seed"} <= {*numeric(sample)}
    assert {"seq", "q_chunk", "timeout", "kv_heads"} <= {*numeric(bench)}
    assert not {"out_dir", "compile", "policy"} & {*numeric(train), *numeric(bench)}


def test_train(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.Trainer, "run", lambda self, folder: None)
    base = arguments(tmp_path, "run", "--max_iters=1")
    statuses = [
        holds(lambda: train.main([*base, flag]), flag, tmp_path, capsys)  # noqa: B023
        for flag in cases(train)
    ]
    assert min(map(statuses.count, (0, 2))) > 100


def test_plan(tmp_path, capsys):
    base = arguments(tmp_path, "run", "--memory=1GB")
    for flag in cases(plan):
        holds(lambda: plan.main([*base, flag]), flag, tmp_path, capsys)  # noqa: B023
    for flag in ("--num_samples", "--kv_bits"):  # which a plan of training does not take
        for number in NUMBERS:
            words = [*base, "--for=sample", f"{flag}={number}"]
            holds(lambda: plan.main(words), words, tmp_path, capsys)  # noqa: B023


@pytest.mark.parametrize("page", [train, plan], ids=lambda page: page.__name__)
@pytest.mark.parametrize(
    "flag", ["learning_rate=-1", "embedding_lr=0", "beta1=1", "beta2=-0.5", "lr_decay_iters=-1"]
)
def test_what_train_refuses_no_plan_names(page, flag, tmp_path, capsys):
    base = arguments(tmp_path, "run", "--memory=1GB")
    assert holds(lambda: page.main([*base, f"--{flag}"]), flag, tmp_path, capsys) == 2


def test_sample(tmp_path, capsys):
    meta = {"tokenizer": "char", "characters": CHARACTERS, "vocab_size": len(CHARACTERS)}
    out_dir = save(tmp_path / "out", meta, n_layer=1, n_embd=32)
    base = [f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=2", "--num_samples=1"]
    for flag in cases(sample):
        holds(lambda: sample.main([*base, flag]), flag, tmp_path, capsys)  # noqa: B023


def test_bench(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    refused = []
    for flag in cases(bench):
        words = ["--device=cpu", flag]
        if holds(
            lambda: bench.grid(parse_config(bench.Settings, words)[0]),  # noqa: B023
            flag,
            tmp_path,
            capsys,
        ):
            refused.append(flag)
    assert {"--kv_heads=0", "--k_chunk=-1", "--q_chunk=0", "--heads=3"} <= {*refused}
