"""What decoding takes, against the tensors that it really has."""

from dataclasses import replace

import pytest
import torch

from leangpt.decoding.generate import bytes_read
from leangpt.int4.quantize import quantize_
from leangpt.kv_cache import build_cache
from leangpt.memory.decoding import Decoding, fits_decoding, longest_context, ways_to_decode
from leangpt.memory.meter import tensor_bytes
from leangpt.memory.search import Budget
from model import GPT, GPTConfig

LLAMA = dict(mlp="swiglu", norm="rmsnorm", position="rope", n_kv_head=2, n_inner=192)
SHAPES = {"gpt2": dict(bias=True), "llama": dict(LLAMA, tie_embeddings=False), "tied": dict(LLAMA)}


def config_of(shape, **more):
    return GPTConfig(
        **dict(block_size=512, vocab_size=96, n_layer=3, n_head=4, n_embd=64) | SHAPES[shape] | more
    )


@pytest.mark.parametrize("int4", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_exact(shape, int4):
    model = GPT(config_of(shape)).eval()
    if int4:
        quantize_(model)
    how = Decoding(model.config, itemsize=4, int4=int4, device_type="cpu")
    kept = tensor_bytes([*model.parameters(), *model.buffers()])
    assert how.weight_bytes == (kept, bytes_read(model, 1)[0])


@pytest.mark.parametrize("policy", ("cache", "recompute"))
@pytest.mark.parametrize("bits", (None, 8, 4))
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_exact(shape, bits, policy):
    config = config_of(shape, attention_policy=policy)
    how = Decoding(config, itemsize=4, kv_bits=bits, device_type="cpu")
    cache = build_cache(config, 1, 512, dtype=torch.float32, kv_bits=bits)
    assert how.row_bytes == cache.bytes_per_token


def test_the_longest_context_is_the_longest():
    how = Decoding(config_of("llama"), device_type="cpu")
    budget = Budget(2 * 10**6)
    longest = longest_context(how, budget)
    assert longest and fits_decoding(how, budget, longest)
    assert not fits_decoding(how, budget, longest + 256)
    assert longest_context(how, Budget(10**4)) == 0
    assert longest_context(Decoding(config_of("gpt2"), device_type="cpu"), Budget(10**9)) == 512


def test_ways_differ_and_keep_what_is_fixed():
    asked = Decoding(config_of("llama"))
    ways = ways_to_decode(asked)
    assert len({(w.int4, w.kv_bits, w.config.attention_policy) for w in ways}) == len(ways) == 12
    assert all(w.kv_bits is None for w in ways_to_decode(asked, {"kv_bits"}))
    assert all(w.int4 for w in ways_to_decode(replace(asked, int4=True)))
