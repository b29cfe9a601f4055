"""The search for plans: what a budget leaves free, and as few checkpointed layers as fit."""

from dataclasses import replace

import pytest

from leangpt.memory.run import Run
from leangpt.memory.search import (
    Budget,
    Wish,
    fewest_checkpoints,
    fits,
    memory_for,
    peak_of,
    with_checkpoints,
)
from model import GPTConfig

CONFIG = GPTConfig(n_layer=12, checkpoint_layers=True, attention_policy="recompute")
ASKED = Run(CONFIG, 32, stream_bytes=2, device_type="cuda", compiled=True)


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("size", (10**8, 4 * 10**9, 6 * 10**9, 7 * 10**10))
def test_the_least_memory_for_a_plan_has_just_its_reserve(size, device):
    memory = memory_for(size, device)
    assert size <= Budget(memory).usable(device) <= size + 2
    assert Budget(memory - 2).usable(device) < size


def test_as_few_layers_are_checkpointed_as_fit():
    least, most = (peak_of(with_checkpoints(ASKED, n)) for n in (12, 1))
    assert least < most
    budget = Budget(memory_for((least + most) // 2, "cuda"))
    found = fewest_checkpoints(ASKED, Wish(ASKED), budget)
    first = found.config.checkpoint_first
    assert 1 < first < 12 and fits(found, budget)
    assert not fits(with_checkpoints(ASKED, first - 1), budget)


def test_a_number_of_checkpointed_layers_that_was_asked_for_stays():
    wish = Wish(ASKED, frozenset({"checkpoint_first"}))
    assert fewest_checkpoints(ASKED, wish, Budget(10**12)) == ASKED
    plain = replace(ASKED, config=replace(CONFIG, checkpoint_layers=False))
    assert fewest_checkpoints(plain, Wish(plain), Budget(10**12)) == plain
