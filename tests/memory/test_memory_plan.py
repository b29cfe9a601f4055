"""The formulas against measured peaks, and the advice against what really fits."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from leangpt.memory.advice import advise_oom, predict_training_peak
from leangpt.memory.block_cell import (
    block_arguments,
    block_peak,
    build_block,
    forward,
    random_input,
)
from leangpt.memory.meter import measure_peak, tensor_bytes
from leangpt.memory.tiles import predict_block_peak, predict_forward_peak
from leangpt.optim import build_optimizer
from leangpt.training import summary
from model import GPT, Block, GPTConfig

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


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("B, T", [(1, 2048), (2, 1024)])
def test_predictions_hold_against_measured_peaks(name, B, T):
    config = replace(SMALL, **VARIANTS[name])
    forward, training = measured(config, B, T)
    assert 0.9 < predict_forward_peak(config, B, T) / forward < 1.35
    assert 0.9 < predict_training_peak(config, B, T) / training < 1.35


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cache", "grouped", "recompute"])
@pytest.mark.parametrize(
    "T, q_chunk, k_chunk",
    [
        (512, 1024, 512),
        (1024, 1024, 512),
        (1536, 1024, 1024),
        (4096, 1024, 512),
        (4096, 2048, 2048),
    ],
)
def test_a_blocks_forward_peak_is_known_to_a_few_percent(policy, T, q_chunk, k_chunk):
    config = GPTConfig(**block_arguments(policy, T, 256, 8, None, q_chunk, k_chunk))
    block = build_block(Block, config)
    x = random_input(config, 1, T)
    peak = block_peak(lambda: forward(block, x), block, x)
    assert predict_block_peak(config, 1, T) == pytest.approx(peak, rel=0.03)


@pytest.mark.slow
def test_a_large_vocabulary_costs_one_chunk_of_logits_not_all_of_them():
    config = replace(SMALL, vocab_size=8192, n_layer=1, **VARIANTS["recompute"])
    _, training = measured(config, 1, 2048)
    predicted = predict_training_peak(config, 1, 2048)
    assert 0.9 < predicted / training < 1.35
    assert training < 2 * 2048 * 8192 * 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["plain", "checkpointed"])
def test_gradients_count_by_their_dtype_and_not_where_each_is_freed(name, fused, dtype):
    """A wide model and few tokens: nearly all that is allocated is gradients."""
    config = replace(SMALL, n_layer=6, n_embd=256, **VARIANTS[name])
    B, T = 1, 256
    torch.manual_seed(0)
    model = GPT(config).to(dtype)
    idx = torch.randint(config.vocab_size, (B, T))
    for p in model.parameters():  # as fused_backward.py's hooks, but for the update
        if fused:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def train():
        model(idx, idx)[1].backward()

    size = 4 if dtype == torch.float32 else 2
    peak, standing = measure_peak(train), predict_training_peak(config, B, T, size, "cpu", size)
    predicted = predict_training_peak(config, B, T, size, "cpu", size, fused)
    assert 0.8 < predicted / peak < 1.35
    if name == "checkpointed":  # plain's peak comes before most of the gradients do
        assert (peak < 0.85 * standing) == (predicted < 0.85 * standing) == fused


@pytest.mark.parametrize("dtype, fused", [(torch.float32, False), (torch.bfloat16, True)])
def test_advice_on_a_gpu_counts_what_is_free_there(dtype, fused, monkeypatch):
    """Others hold most of it; this process holds some, cache included; gradients by their dtype."""
    model = GPT(SMALL).to(dtype)
    optimizer = build_optimizer(model, "muonsn8", fused_backward=fused)
    free, reserved = 30_000_000, 20_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    runtime = SimpleNamespace(device_type="cuda", device=torch.device("cuda"), dtype=dtype)
    settings = SimpleNamespace(
        batch_size=1,
        block_size=65536,
        optimizer_options="x",
        param_dtype=str(dtype).removeprefix("torch."),
    )
    room = free + reserved - tensor_bytes(model) - summary.optimizer_bytes(optimizer)
    size = dtype.itemsize
    wanted = advise_oom(
        SMALL, 1, 65536, room, size, "cuda", gradient_size=size, fused_backward=fused
    )
    assert (
        summary.advise_oom(settings, None, runtime, model, optimizer) == "out of memory: " + wanted
    )
    assert f"of {room / 1e6:.0f} MB at hand" in wanted


@pytest.mark.slow
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
    chosen = replace(
        SMALL,
        attention_policy=policy,
        q_chunk=int(named["q_chunk"]),
        checkpoint_layers=named.get("checkpoint_layers") == "True",
    )
    assert measured(chosen, B, T)[1] <= available


def test_cheap_advice_comes_first():
    need = predict_training_peak(SMALL, 1, 4096)
    assert "cache --q_chunk=512 would need" in advise_oom(SMALL, 1, 4096, need * 0.6)
    assert "checkpoint_layers" not in advise_oom(SMALL, 1, 4096, need * 0.6)


def test_advice_where_nothing_fits_names_the_longest_sequence_that_would():
    advice = advise_oom(SMALL, 1, 2**20, 20e6)
    assert "no policy fits. --attention_policy=recompute" in advice
    assert "checkpoint_layers=True would fit 1 x" in advice
    assert "offload" in advise_oom(SMALL, 1, 2**20, 90e6, device_type="cuda")
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
