"""The table of policies: all that a new one needs, and nobody who compares names."""

import re
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT
from reference import relative_error

import attention_policies
from attention_policies import POLICIES, Policy
from leangpt.attention.kv_source import RecomputedRows
from leangpt.kv_cache.cache import KeysValues, build_cache
from leangpt.memory.formulas import predict_training_peak
from leangpt.memory.meter import measure_peak
from leangpt.memory.run import Run
from leangpt.memory.search import Wish, ways
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

SMALL = dict(block_size=32, vocab_size=50, n_layer=2, n_head=4, n_embd=32, position="rope")


def test_a_policy_is_one_entry_and_its_classes(monkeypatch):
    """A policy that recomputes while training and stores keys and values while decoding."""
    asked = []

    class Counted(RecomputedRows):
        def rows(self, start, stop):
            asked.append((start, stop))
            return super().rows(start, stop)

    class Halves(KeysValues):
        pass

    new = Policy("counted", "as recompute, counted", source=Counted, cache_layer=Halves)
    monkeypatch.setitem(attention_policies.POLICIES, "counted", new)
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**SMALL))
    model = GPT(GPTConfig(**SMALL, attention_policy="counted", q_chunk=8))
    model.load_state_dict(plain.state_dict())
    idx = torch.randint(50, (1, 32))
    losses = [m(idx, idx)[1] for m in (plain, model)]
    assert abs(losses[0] - losses[1]) < 1e-6 and (24, 32) in asked
    cache = build_cache(model.config, 1, 32)
    assert all(isinstance(layer, Halves) for layer in cache.layers)
    with torch.no_grad():
        last = model.prefill(idx[:, :31], cache), model.decode_one_token(idx[:, 31:], cache)
        assert torch.allclose(torch.stack(last, 1), plain(idx)[0][:, 30:], atol=1e-5)
    as_recompute = GPTConfig(**asdict(model.config) | {"attention_policy": "recompute"})
    peaks = [predict_training_peak(config, 1, 4096) for config in (model.config, as_recompute)]
    assert peaks[0] == peaks[1]
    plain = replace(model.config, attention_policy="cache", q_chunk=None, block_size=4096)
    cache = replace(POLICIES["cache"], leaner="counted")
    monkeypatch.setitem(attention_policies.POLICIES, "cache", cache)
    assert any(way.config.attention_policy == "counted" for way in ways(Wish(Run(plain))))


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_of_the_table(name):
    """Its loss, gradients and cached logits are the plain block's, its peak as predicted."""
    torch.manual_seed(0)
    shape = SMALL | dict(n_kv_head=2)
    plain = GPT(GPTConfig(**shape))
    model = GPT(GPTConfig(**shape, attention_policy=name, q_chunk=7, k_chunk=5))
    model.load_state_dict(plain.state_dict())
    idx = torch.randint(50, (2, 32))
    losses = [m(idx, idx)[1] for m in (plain, model)]
    assert abs(losses[0] - losses[1]) < 1e-6
    for loss in losses:
        loss.backward()
    for a, b in zip(plain.parameters(), model.parameters()):
        assert relative_error(b.grad, a.grad) < 1e-5
    cache = build_cache(model.config, 2, 32)
    with torch.no_grad():
        last = model.prefill(idx[:, :31], cache), model.decode_one_token(idx[:, 31:], cache)
        assert torch.allclose(torch.stack(last, 1), plain(idx)[0][:, 30:], atol=1e-5)
    config = replace(model.config, block_size=2048, n_embd=64, q_chunk=128, k_chunk=128)
    long, idx = GPT(config), torch.randint(50, (1, 2048))
    peak = measure_peak(lambda: long(idx, idx)[1].backward())
    assert 0.9 < predict_training_peak(config, 1, 2048) / peak < 1.35


def test_where_memory_runs_out_policies_lead_to_one_that_keeps_nothing():
    for policy in POLICIES.values():
        while policy.leaner:
            policy = POLICIES[policy.leaner]
        assert policy.recomputes


def test_no_code_compares_a_policys_name():
    names = "|".join(POLICIES)
    compared = re.compile(rf"""(==|!=|\bin \() *["']({names})["']""")
    files = [*ROOT.glob("*.py"), *(ROOT / "leangpt").rglob("*.py")]
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        for line in path.read_text().splitlines()
        if compared.search(line)
    }
    assert found == set()


def test_grouped_has_a_quarter_of_the_heads_unless_told_otherwise():
    assert GPTConfig(n_head=8, n_embd=64, attention_policy="grouped").kv_heads == 2
    assert GPTConfig(n_head=2, n_embd=64, attention_policy="grouped").kv_heads == 1
    assert GPTConfig(n_head=8, n_embd=64, attention_policy="grouped", n_kv_head=4).kv_heads == 4
    assert GPTConfig(n_head=8, n_embd=64).kv_heads == 8
    with pytest.raises(UserError, match="smaller than n_head=8; use 'cache'"):
        GPTConfig(n_head=8, n_embd=64, attention_policy="grouped", n_kv_head=8)
