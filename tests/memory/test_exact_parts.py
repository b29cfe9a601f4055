"""What is kept from step to step is known to the byte, for every optimizer and shape."""

import pytest
import torch

from leangpt.memory.formulas import moments
from leangpt.memory.given_up import given_up
from leangpt.memory.goals import refusal
from leangpt.memory.meter import tensor_bytes
from leangpt.memory.run import Run, one_layer
from leangpt.memory.search import Budget, Wish, fastest
from leangpt.memory.tiles import sum_scratch
from leangpt.memory.units import parse_bytes
from leangpt.optim import VARIANTS, build_optimizer, planned_bytes
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

SMALL = dict(block_size=48, vocab_size=100, n_layer=3, n_head=4, n_embd=40)
LLAMA = dict(mlp="swiglu", norm="rmsnorm", position="rope", n_kv_head=2, n_inner=96)
SHAPES = {
    "gpt2": dict(bias=True),
    "llama": dict(LLAMA, tie_embeddings=False),
    "qwen": dict(LLAMA, qkv_bias=True, qk_norm=True, n_head_dim=16),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_layer_has_the_parameters_of_a_gpt(shape):
    config = GPTConfig(**SMALL | SHAPES[shape] | {"n_layer": 1})
    theirs = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    assert {n: tuple(p.shape) for n, p in one_layer(config).named_parameters()} == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_state_are_exact(shape, variant, dtype):
    config = GPTConfig(**SMALL | SHAPES[shape])
    model = GPT(config).to(dtype)
    optimizer = build_optimizer(model, variant)
    state = sum(planned_bytes(optimizer, p, g) for g in optimizer.param_groups for p in g["params"])
    run = Run(config, variant=variant, param_bytes=dtype.itemsize, stream_bytes=dtype.itemsize)
    parts = moments(run)["the optimizer's step"]
    weights = tensor_bytes(model.parameters())
    assert (parts["weights"], parts["state"], parts["gradients"]) == (weights, state, weights)


def test_the_first_plan_changes_nothing_where_all_fits():
    asked = Run(GPTConfig(), 12, 1024, 40, stream_bytes=2, device_type="cuda")
    first = fastest(Wish(asked), Budget(80 * 10**9))[0]
    assert first.gives_up == () and first.run.batch_size * first.run.micro_batches == 480
    assert first.peak <= 80e9


@pytest.mark.slow
def test_plans_fit_and_nothing_fits_in_nothing():
    asked = Run(GPTConfig(), 12, 1024, 40, stream_bytes=2, device_type="cuda")
    for budget in (Budget(2 * 10**9), Budget(6 * 10**9)):
        plans = fastest(Wish(asked), budget)
        assert plans and all(p.peak < budget.memory for p in plans)
    assert fastest(Wish(asked), Budget(10**8)) == []
    assert "the least that this model takes is" in refusal(Wish(asked), Budget(10**8))


@pytest.mark.parametrize("text, size", [("24GB", 24e9), ("1 GiB", 2**30), ("512mb", 512e6)])
def test_bytes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "24 cows", "-3GB", "0GB", "1e400GB", "nanGB", "GB"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(UserError, match="write bytes as 24GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "rows, columns, size",
    [(2397, 1024, 19_922_944), (4096, 4096, 134_217_728), (2048, 2560, 41_943_040), (63, 512, 0)],
)
def test_what_a_sum_over_rows_sets_aside_on_a_gpu(rows, columns, size):
    """As an H100 was seen to allocate: for a bias's gradient, and for norms of stacked columns."""
    assert sum_scratch(rows, columns) == size


@pytest.mark.parametrize(
    "first, says", [(None, "every layer"), (1, "the first layer"), (3, "the first 3 layers")]
)
def test_which_layers_are_computed_again_is_said(first, says):
    config = GPTConfig(n_layer=4, checkpoint_layers=True, checkpoint_first=first)
    lost = given_up(Run(config), Run(GPTConfig(n_layer=4)))
    assert f"{says} computed again" in lost
