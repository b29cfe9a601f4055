"""How large tiles are, and how much goes through them at once."""

import torch

from leangpt.attention.tile_sizes import default_chunk, heads_at_once, tile_sizes
from model import GPTConfig


def test_heads_taken_at_once(monkeypatch):
    """Enough for the threads, no fewer than fill a tile; all of them on CUDA."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    config = GPTConfig(n_head=8, n_embd=64)
    assert [heads_at_once(config, T, 1024, 1, "cpu") for T in (1024, 2048, 4096, 16384)] == [
        8,
        4,
        2,
        2,
    ]
    assert heads_at_once(config, 16384, 1024, 2, "cpu") == 1  # two sequences
    assert heads_at_once(config, 16384, 1024, 1, "cuda") == 8
    grouped = GPTConfig(n_head=8, n_embd=64, n_kv_head=2)
    assert heads_at_once(grouped, 16384, 1024, 1, "cpu") == 2  # one would idle a thread
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert heads_at_once(config, 16384, 1024, 1, "cpu") == 8


def test_short_sequences_train_on_the_plain_block():
    for width, device_type, chunk, longest in (
        (256, "cpu", 2048, 6144),
        (768, "cpu", 8192, 12288),
        (256, "cuda", 4096, 6144),
        (64, "cuda", 1024, 1536),
    ):
        config = GPTConfig(n_head=8, n_embd=width, attention_policy="recompute")
        assert default_chunk(config, device_type) == chunk
        assert tile_sizes(config, longest, device_type, training=True) is None
        assert tile_sizes(config, longest + 1, device_type, training=True) == (chunk, chunk)
        assert tile_sizes(config, 1024, device_type, training=False) == (chunk, chunk)
