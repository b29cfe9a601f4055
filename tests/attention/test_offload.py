"""Offloading without a GPU: streams that do nothing stand in, the order of things is the same."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from leangpt.attention import offload
from model import GPT, GPTConfig


class NoStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        assert event == "recorded"

    def record_event(self):
        return "recorded"


class Watch:
    """The handles that live, and how many of them held a device tensor at any copy."""

    def __init__(self):
        self.handles, self.held = weakref.WeakSet(), []


@pytest.fixture
def watch(monkeypatch):
    """Lets `offload` run on the CPU."""
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(offload, "_host_like", torch.empty_like)
    monkeypatch.setattr(offload, "_copy_stream", NoStream)
    seen, copy = Watch(), offload.Handle._copy

    def watched(self, to, source):
        seen.handles.add(self)
        copy(self, to, source)
        seen.held.append(sum(handle.x is not None for handle in seen.handles))

    monkeypatch.setattr(offload.Handle, "_copy", watched)
    return seen


def gradients(offloaded, backwards=1):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=32,
            vocab_size=16,
            n_layer=6,
            n_head=2,
            n_embd=16,
            attention_policy="recompute",
            q_chunk=8,
            k_chunk=8,
            checkpoint_layers=True,
            offload=offloaded,
        )
    )
    idx = torch.randint(16, (2, 32))
    loss = model(idx, idx.roll(-1, 1))[1]
    for _ in range(backwards):
        loss.backward(retain_graph=True)
    return [p.grad for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("backwards", (1, 2))
def test_gradients_are_the_same_and_two_layers_are_on_the_device(watch, backwards):
    for found, expected in zip(gradients(True, backwards), gradients(False, backwards)):
        assert torch.equal(found, expected)
    assert len(watch.held) == 6 + 5 + 6 * (backwards - 1)  # the last layer's is still there once
    assert max(watch.held) <= 2


def test_a_pass_without_backward_leaves_nothing_behind(watch):
    model = GPT(
        GPTConfig(
            block_size=16,
            vocab_size=16,
            n_layer=2,
            n_head=2,
            n_embd=16,
            checkpoint_layers=True,
            q_chunk=8,
            offload=True,
        )
    )
    logits, _ = model(torch.zeros(1, 16, dtype=torch.int64))
    assert len(watch.handles) == 2
    del logits
    gc.collect()
    assert not watch.handles
