"""The formulas against measured peaks, and the advice against what really fits."""

from dataclasses import replace

import pytest
import torch

from memory import measure_peak
from memory_plan import advise_oom, predict_forward_peak, predict_training_peak
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=4096, vocab_size=96, n_layer=3, n_head=4, n_embd=64, position="none")
TILES = {"q_chunk": 128, "k_chunk": 128}
VARIANTS = {
    "plain": {},
    "plain, 1 key/value head": {"n_kv_head": 1},
    "plain, swiglu": {"mlp": "swiglu"},
    "cache": TILES,
    "grouped": {"attention_policy": "grouped", "n_kv_head": 1, **TILES},
    "recompute": {"attention_policy": "recompute", **TILES},
    "recompute, uneven": {"attention_policy": "recompute", "q_chunk": 256, "k_chunk": 64},
    "checkpointed": {"attention_policy": "recompute", "checkpoint_layers": True, **TILES},
    "checkpointed, 1 head": {"n_kv_head": 1, "checkpoint_layers": True, **TILES},
}


def step_of(config, B, T):
    """A function that runs one forward and backward, and one that only runs forward."""
    torch.manual_seed(0)
    model = GPT(config)
    idx = torch.randint(config.vocab_size, (B, T))

    def train():
        model.zero_grad(set_to_none=True)
        _, loss = model(idx, idx)
        loss.backward()

    def forward():
        with torch.inference_mode():
            model.last_logits(idx)

    return train, forward, model


def measured(config, B, T):
    train, forward, model = step_of(config, B, T)
    forward_peak = measure_peak(forward)
    training_peak = measure_peak(train)
    model.zero_grad(set_to_none=True)
    return forward_peak, training_peak


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("B, T", [(1, 2048), (2, 1024)])
def test_predictions_hold_against_measured_peaks(name, B, T):
    config = replace(SMALL, **VARIANTS[name])
    forward, training = measured(config, B, T)
    assert 0.9 < predict_forward_peak(config, B, T) / forward < 1.35
    assert 0.9 < predict_training_peak(config, B, T) / training < 1.35


def test_a_large_vocabulary_costs_one_chunk_of_logits_not_all_of_them():
    config = replace(SMALL, vocab_size=8192, n_layer=1, **VARIANTS["recompute"])
    _, training = measured(config, 1, 2048)
    predicted = predict_training_peak(config, 1, 2048)
    assert 0.9 < predicted / training < 1.35
    assert training < 2 * 2048 * 8192 * 4


@pytest.mark.parametrize("share, policy", [(0.5, "cache"), (0.25, "recompute")])
def test_the_advice_fits_and_what_it_replaces_does_not(share, policy):
    """What is advised is then run, and its peak measured."""
    B, T = 1, 4096
    available = share * predict_training_peak(SMALL, B, T)
    advice = advise_oom(SMALL, B, T, available)
    assert "under --attention_policy=cache need about" in advice
    words = advice.split("; ")[1].split(" would need")[0].split()
    named = dict(word.removeprefix("--").split("=") for word in words)
    assert named["attention_policy"] == policy
    chosen = replace(SMALL, attention_policy=policy, q_chunk=int(named["q_chunk"]),
                     checkpoint_layers=named.get("checkpoint_layers") == "True")
    assert measured(chosen, B, T)[1] <= available


def test_cheap_advice_comes_first():
    need = predict_training_peak(SMALL, 1, 4096)
    assert "cache --q_chunk=512 would need" in advise_oom(SMALL, 1, 4096, need * 0.6)
    assert "checkpoint_layers" not in advise_oom(SMALL, 1, 4096, need * 0.6)


def test_advice_where_nothing_fits_names_the_longest_sequence_that_would():
    advice = advise_oom(SMALL, 1, 2**20, 20e6)
    assert "no policy fits. --attention_policy=recompute" in advice
    assert "checkpoint_layers=True would fit 1 x" in advice
    assert "offload" in advise_oom(SMALL, 1, 2**20, 20e6, device_type="cuda")
    assert "the model itself is too large" in advise_oom(SMALL, 1, 2**20, 1000)


def test_gpt2_at_long_context_needs_one_stream_a_layer():
    """124M parameters, bfloat16 stream on CUDA: one stream a layer when checkpointed."""
    config = GPTConfig(position="none", attention_policy="recompute", checkpoint_layers=True)
    T = 2**20
    stream = T * 768 * 2
    lse = T * 12 * 4
    peak = predict_training_peak(config, 1, T, element_size=2, device_type="cuda")
    assert 12 * (stream + lse) < peak < 12 * (stream + lse) + 8 * stream
    offloaded = predict_training_peak(replace(config, offload=True), 1, T, 2, "cuda")
    assert offloaded < peak - 8 * stream
