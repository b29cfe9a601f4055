"""Gradients summed in few bits: what their sums take, against the exact meter."""

from dataclasses import replace

import pytest
import torch

from leangpt.memory.formulas import moments
from leangpt.memory.meter import measure_peak
from leangpt.memory.run import Run
from leangpt.memory.sums import at_step, standing
from leangpt.optim import build_optimizer
from leangpt.optim.backward.gradient_sums import TOGETHER
from model import GPT, GPTConfig

WIDE = GPTConfig(block_size=64, vocab_size=256, n_layer=4, n_head=4, n_embd=192, position="rope")
LLAMA = dict(mlp="swiglu", norm="rmsnorm", n_kv_head=2, n_inner=400, tie_embeddings=False)
CONFIGS = {
    "plain": WIDE,
    "plain, llama": replace(WIDE, **LLAMA),
    "tiles": replace(WIDE, q_chunk=32, k_chunk=32),
    "checkpoint": replace(WIDE, checkpoint_layers=True),
    "a large table": replace(WIDE, vocab_size=8192, n_layer=1, n_embd=64),
    "a large head": replace(WIDE, vocab_size=8192, n_layer=1, n_embd=64, tie_embeddings=False),
}
NOT_MEASURED = ("weights", "state")  # which stand before the step


def attends_in_bfloat16():
    """PyTorch's attention in bfloat16 fails where ATEN_CPU_CAPABILITY is below what a processor
    with matrix instructions has: it packs for instructions that its kernel was not built with."""
    q = torch.zeros(1, 1, 64, 48, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    except RuntimeError as error:
        return "avx512" not in str(error)
    return True


def step_of(run):
    """(model, a step of its micro-batches)."""
    torch.manual_seed(0)
    model = GPT(run.config).to(torch.float32 if run.param_bytes == 4 else torch.bfloat16)
    optimizer = build_optimizer(model, run.variant, **run.options)
    idx = torch.randint(run.config.vocab_size, (run.batch_size, run.length))

    def step():
        for _ in range(run.micro_batches):
            model(idx, idx)[1].backward()
        optimizer.step()

    return step


def predicted(run):
    """Bytes of a step beyond weights, state and tokens."""
    most = max(
        sum(size for part, size in parts.items() if part not in NOT_MEASURED)
        for parts in moments(run).values()
    )
    return most - 16 * run.tokens


def error(name, bits, micro_batches, variant, size):
    """Of the predicted peak, with weights and state, against the measured one."""
    options = {"gradient_bits": bits}
    run = Run(CONFIGS[name], 1, None, micro_batches, variant, options, size, size)
    step = step_of(run)
    step()  # now its state is there
    kept = sum(t.count * (t.bytes + t.state_bytes) for t in run.tensors)
    return (predicted(run) + kept) / (measure_peak(step) + kept) - 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "bits, micro_batches, size", [(8, 2, 4), pytest.param(4, 3, 2, marks=pytest.mark.slow)]
)
def test_a_step_takes_what_was_predicted(name, bits, micro_batches, size):
    if size == 2 and not attends_in_bfloat16():
        pytest.skip("PyTorch's own bfloat16 attention does not run as it is set up here")
    assert abs(error(name, bits, micro_batches, "adamsn8", size)) <= 0.02


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("variant", ["adamsn8", "muonsn8", "adafactor"])
@pytest.mark.parametrize("bits, micro_batches", [(8, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("name", ["plain, llama", "tiles", "a large table", "a large head"])
def test_so_does_every_optimizer(name, bits, micro_batches, variant, size):
    assert abs(error(name, bits, micro_batches, variant, size)) <= 0.02


def test_small_tensors_become_gradients_a_few_at_a_time():
    """Of a large model the step holds sums and a few tensors' gradients, never all of these."""
    run = Run(GPTConfig(), 1, None, 2, "adamsn8", {"gradient_bits": 8}, device_type="cuda")
    weights = sum(t.bytes * t.count for t in run.tensors)
    sums, table = 1.0625 / 4 * weights, 4 * 50304 * 768
    assert sums < at_step(run)[0] < sums + 4 * TOGETHER + table < 0.75 * weights
    assert standing(run, run.tensors[0]) == run.tensors[0].numbers * 34 // 32
