"""Memory on huge pages is ordinary memory, one piece of it."""

import pytest
import torch
from torch import nn

from leangpt.int4.quantize import int4_layers, quantize_
from leangpt.kv_cache.cache import build_cache
from leangpt.system import huge_pages
from model import GPT, GPTConfig


@pytest.fixture
def small_is_enough(monkeypatch):
    monkeypatch.setattr(huge_pages, "LEAST", 1)


def piece(tensor):
    return tensor.untyped_storage().data_ptr()


def test_only_whole_pages_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *call: asked.append(call))
    monkeypatch.setattr(huge_pages.mmap, "MADV_HUGEPAGE", 14, raising=False)
    memory = huge_pages.empty(huge_pages.LEAST + 12345)
    ((first, count, _),) = asked
    assert first % huge_pages.PAGE == 0 == count % huge_pages.PAGE
    before, after = first - memory.data_ptr(), memory.data_ptr() + len(memory) - (first + count)
    assert 0 <= before < huge_pages.PAGE and 0 <= after < huge_pages.PAGE
    huge_pages.empty(huge_pages.LEAST - 1)
    huge_pages.empty(huge_pages.LEAST, device="meta")
    assert len(asked) == 1


def test_without_such_advice_memory_is_ordinary(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert huge_pages.empty(huge_pages.LEAST).shape == (huge_pages.LEAST,)


def test_gathered_buffers_keep_their_numbers(small_is_enough):
    layers = [nn.BatchNorm1d(n) for n in (3, 70)]
    for layer in layers:
        layer.running_mean.normal_()
    wanted = [layer.running_mean.clone() for layer in layers]
    huge_pages.gather_(layers, ("running_mean", "num_batches_tracked"))
    for layer, want in zip(layers, wanted):
        assert torch.equal(layer.running_mean, want)
        assert layer.running_mean.data_ptr() % 64 == 0
        assert "running_mean" in layer.state_dict()
    assert len({piece(b) for m in layers for b in (m.running_mean, m.num_batches_tracked)}) == 1
    assert layers[0].running_var.untyped_storage().nbytes() == 12  # not asked to move


def test_a_rounded_model_and_its_cache_lie_in_one_piece_each(small_is_enough):
    model = GPT(GPTConfig(block_size=32, vocab_size=61, n_layer=3, n_head=4, n_embd=64)).eval()
    quantize_(model)
    layers = list(int4_layers(model).values())
    assert len(layers) == 13 and len({piece(m.packed) for m in layers}) == 1
    assert {piece(m.packed) for m in layers} == {piece(m.scale_zero) for m in layers}
    for options in (dict(), dict(dtype=torch.bfloat16)):
        cache = build_cache(model.config, 2, 20, **options)
        tensors = [t for layer in cache.layers for t in layer.tensors()]
        assert len(tensors) == 6 and len({piece(t) for t in tensors}) == 1
        assert len({t.data_ptr() for t in tensors}) == 6 and not any(t.any() for t in tensors)
