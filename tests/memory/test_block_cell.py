"""The reference that blocks are compared with, and their peaks."""

import math

import pytest
import torch

from leangpt.memory.block_cell import (
    block_arguments,
    block_peak,
    build_block,
    forward,
    forward_error,
    max_relative_error,
    random_input,
    reference_rows,
)
from leangpt.memory.tiles import predict_block_peak
from leangpt.system.errors import UserError
from model import Block, GPTConfig


def test_the_reference_is_attention_written_out_by_hand():
    """Against loops over heads and rows, with 2 key/value heads for 4 query heads."""
    config = GPTConfig(**block_arguments("grouped", 6, 8, 4))
    block = build_block(Block, config, dtype=torch.float64)
    x = random_input(config, 1, 6, dtype=torch.float64)
    with torch.no_grad():
        h = block.ln_1(x)[0]  # (T, C)
        q, k, v = block.attn.c_attn(h).split((8, 4, 4), dim=-1)
        y = torch.zeros(6, 8, dtype=torch.float64)
        for head in range(4):
            own, shared = slice(2 * head, 2 * head + 2), slice(head // 2 * 2, head // 2 * 2 + 2)
            for t in range(6):
                scores = [math.exp(q[t, own] @ k[s, shared] / math.sqrt(2)) for s in range(t + 1)]
                y[t, own] = sum(w * v[s, shared] for s, w in enumerate(scores)) / sum(scores)
        x2 = x[0] + block.attn.c_proj(y)
        expected = x2 + block.mlp(block.ln_2(x2))
    rows = torch.tensor([5, 0, 3])
    assert max_relative_error(reference_rows(block, x, rows)[0], expected[rows]) < 1e-14


@pytest.mark.parametrize("policy", ["plain", "cache", "grouped", "recompute"])
def test_every_policy_agrees_with_the_reference_and_a_wrong_block_does_not(policy):
    config = GPTConfig(**block_arguments(policy, 100, 32, 4, q_chunk=16, k_chunk=24))
    block = build_block(Block, config)
    x = random_input(config, 2, 100)
    assert forward_error(block, block, x) < 1e-6
    other = build_block(Block, config, seed=7)
    assert forward_error(other, block, x) > 1e-2
    with torch.no_grad():
        other.load_state_dict(block.state_dict())
        other.attn.c_attn.weight[0] *= 1.01  # one row of one head's queries, by one per cent
    assert forward_error(other, block, x) > 1e-5


def test_long_sequences_are_compared_on_a_sample_and_huge_ones_not_at_all(monkeypatch):
    config = GPTConfig(**block_arguments("plain", 5000, 8, 2))
    block = build_block(Block, config)
    assert forward_error(block, block, random_input(config, 1, 5000)) < 1e-5
    monkeypatch.setattr("leangpt.memory.block_cell.REFERENCE_BYTES", 1000)
    assert forward_error(block, block, random_input(config, 1, 5000)) is None


@pytest.mark.slow
def test_recompute_needs_no_more_memory_for_a_longer_sequence():
    """What a pass without gradients allocates beyond its input does not depend on T."""

    def peak(policy, T):
        config = GPTConfig(**block_arguments(policy, T, 64, 4, q_chunk=64, k_chunk=64))
        block = build_block(Block, config)
        x = random_input(config, 1, T)
        return block_peak(lambda: forward(block, x), block, x)

    assert peak("recompute", 2048) < 1.05 * peak("recompute", 1024)
    assert peak("recompute", 2048) < 0.03 * peak("plain", 2048)
    stream = 1024 * 64 * 4
    assert abs(peak("cache", 2048) - peak("cache", 1024) - 2 * stream) < 0.02 * stream  # K and V
    assert abs(peak("grouped", 2048) - peak("grouped", 1024) - stream) < 0.02 * stream


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["plain", "cache", "grouped", "recompute"])
@pytest.mark.parametrize("B, T", [(1, 4096), (2, 2048)])
def test_the_peak_of_a_block_is_what_the_formula_says(policy, B, T):
    config = GPTConfig(**block_arguments(policy, T, 256, 8, q_chunk=512, k_chunk=512))
    block = build_block(Block, config)
    x = random_input(config, B, T)
    peak = block_peak(lambda: forward(block, x), block, x)
    assert 0.97 < predict_block_peak(config, B, T) / peak < 1.1


def test_an_unknown_cell_is_named():
    with pytest.raises(UserError, match="unknown policy 'lain'; choose from: plain, cache"):
        block_arguments("lain", 8, 8, 2)
