"""data_order=once: every token once, in an order of the seed's; resumed and shared out alike."""

import sys
from pathlib import Path

import numpy as np
import pytest
from test_resume import assert_same_run, stop_at
from tiny_run import arguments, determined

import train
from configurator import parse_config
from leangpt.system.errors import UserError
from leangpt.text.dataset import Dataset, load_dataset
from leangpt.text.one_pass import OnePass, one_pass

ONCE = [
    "--data_order=once",
    "--max_iters=6",
    "--eval_interval=0",
    "--gradient_accumulation_steps=2",
]


def settings(*flags):
    return parse_config(train.Settings, [*ONCE, *flags])[0]


@pytest.fixture
def dataset(tmp_path):
    arguments(tmp_path, "unused")
    return load_dataset("tiny", tmp_path / "data")


def test_every_token_is_a_target_once(dataset):
    T, B = 16, 4
    count = (len(dataset.train) - 1) // T // B
    blocks = one_pass(
        settings(
            f"--block_size={T}",
            f"--batch_size={B}",
            f"--max_iters={count}",
            "--gradient_accumulation_steps=1",
        ),
        dataset,
    )
    rows = [tuple(row.tolist()) for number in range(count) for row in blocks.batch(number)[0]]
    whole = [tuple(dataset.train[i : i + T].tolist()) for i in range(0, len(dataset.train) - T, T)]
    assert len(rows) > 100 and rows != sorted(rows)
    left = list(whole)
    for row in rows:
        left.remove(row)  # a row read twice, or one that is no block, is not there
    assert len(left) < B
    x, y = blocks.batch(0)
    assert x.shape == y.shape == (B, T) and x[:, 1:].equal(y[:, :-1])


def test_the_seed_decides_the_order(dataset):
    one, same, other = (
        one_pass(settings("--block_size=16", "--batch_size=4", f"--seed={seed}"), dataset)
        for seed in (1, 1, 2)
    )
    assert one.batch(3)[0].equal(same.batch(3)[0]) and not one.batch(3)[0].equal(other.batch(3)[0])


def test_a_short_text_is_read_as_the_beginning_of_a_long_one(monkeypatch):
    monkeypatch.setattr(sys.modules["leangpt.text.one_pass"], "GROUP", 8)
    tokens = np.arange(16 * 50 + 1, dtype=np.uint16)
    short, long = (
        OnePass(Dataset("tiny", Path(), tokens[:length], tokens, {}), 4, 16, 2, seed=3)
        for length in (16 * 30 + 1, len(tokens))
    )
    assert (short.order[:24] == long.order[:24]).all() and len(short.order) == 30
    assert sorted(short.order) == list(range(30)) and sorted(long.order) == list(range(50))
    assert short.batch(2, 1)[0].equal(long.batch(2, 1)[0])


def test_too_few_tokens_and_unknown_orders_are_said(dataset):
    with pytest.raises(UserError, match="read 80,000 blocks of 16 tokens, tiny has"):
        one_pass(settings("--block_size=16", "--batch_size=4", "--max_iters=10000"), dataset)
    with pytest.raises(UserError, match="unknown data_order 'twice'"):
        one_pass(settings("--data_order=twice"), dataset)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_blocks(tmp_path, monkeypatch):
    flags = [*ONCE, "--eval_interval=3"]
    train.main(arguments(tmp_path, "whole", *flags))
    with monkeypatch.context() as patch:
        stop_at(patch, 4, 15)
        with pytest.raises(SystemExit):
            train.main(arguments(tmp_path, "cut", *flags))
    train.main(arguments(tmp_path, "cut", *flags, "--init_from=resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    train.main(arguments(tmp_path, "random", *flags, "--data_order=random"))
    assert determined(tmp_path / "whole") != determined(tmp_path / "random")
