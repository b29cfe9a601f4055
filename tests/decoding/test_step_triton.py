"""The fused decoding step computes what the plain one does; the real compiler takes its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from leangpt.decoding import step_triton
from leangpt.decoding.step_triton import linear, words_of
from leangpt.int4.quantize import round_linear
from leangpt.kv_cache import cache_triton
from leangpt.kv_cache.cache import build_cache
from model import GPT, GPTConfig, Norm

ROOT = Path(__file__).resolve().parents[2]
needs_kernels = pytest.mark.skipif(
    not cache_triton.AVAILABLE, reason="needs CUDA, or Triton and TRITON_INTERPRET=1"
)
DEVICE = "cpu" if cache_triton.INTERPRETED or not torch.cuda.is_available() else "cuda"


def four_bit(linear, group=32):
    """The linear's 4-bit layer in the order of the CUDA kernel, on any device."""
    layer = round_linear(linear, group)
    if layer.layout != "cuda":
        words = words_of(layer.codes().long(), step_triton.inner_tiles(layer.in_features))
        dense = layer.dequantize()
        layer.packed, layer.layout = words, "cuda"
        layer.dequantize = lambda dtype=torch.float32: dense.to(dtype)
    return layer


def test_word_order_holds_every_code_once():
    codes = torch.randint(16, (8, 128))
    words = words_of(codes, 8)
    assert words.numel() * 8 == codes.numel() and words.dtype == torch.int32
    counted = sum(((words >> (4 * i)) & 15).bincount(minlength=16) for i in range(8))
    assert torch.equal(counted, codes.flatten().bincount(minlength=16))


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(
    "K,N,norm,activation,bias,residual",
    [
        (768, 48, "layernorm", None, False, False),
        (576, 80, "rmsnorm", "swiglu", False, False),
        (128, 32, "layernorm", "gelu", True, False),
        (384, 48, None, "gelu_tanh", True, True),
        (3072, 16, None, None, False, True),
    ],
)
def test_linear(K, N, norm, activation, bias, residual, bits):
    torch.manual_seed(0)
    dtype = torch.bfloat16
    config = GPTConfig(n_embd=K, n_head=1, bias=bias, norm=norm or "layernorm")
    layer = torch.nn.Linear(K, N * (2 if activation == "swiglu" else 1), bias=bias)
    layer = layer.to(DEVICE, dtype)
    norm_layer = None
    if norm:
        norm_layer = Norm(config).to(DEVICE, dtype)
        norm_layer.weight.copy_(torch.rand(K) + 0.5)
    x = torch.randn(2, K).to(DEVICE, dtype) + 1
    old = torch.randn(2, N).to(DEVICE, dtype) if residual else None
    weight = layer.weight.float()
    if bits == 4:
        layer = four_bit(layer)
        weight = layer.dequantize().float()
    got = linear(x, layer, norm_layer, activation, old)
    want = x if norm is None else norm_layer(x)
    want = F.linear(want.float(), weight, layer.bias.float() if bias else None)
    if activation == "swiglu":
        gate, up = want.chunk(2, -1)
        want = F.silu(gate) * up
    elif activation:
        want = F.gelu(want, approximate="tanh" if activation == "gelu_tanh" else "none")
    if residual:
        want = want + old.float()
    assert got.dtype == dtype and got.shape == (2, N)
    limit = 0.02 if cache_triton.INTERPRETED else 4e-3  # it cuts bfloat16 off, not rounds
    assert (got.float() - want).norm() < limit * want.norm()


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(position="rope", norm="rmsnorm", mlp="swiglu", n_kv_head=1, bias=False),
        dict(position="none", mlp="gelu_tanh", tie_embeddings=False),
    ],
)
def test_step_is_the_models_own(options, kv_bits):
    torch.manual_seed(0)
    settings = dict(block_size=40, vocab_size=61, n_layer=2, n_head=2, n_embd=64, bias=True)
    model = GPT(GPTConfig(**(settings | options))).eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    # the interpreter multiplies the bits of bfloat16 numbers in tl.dot
    dtype = torch.float16 if cache_triton.INTERPRETED else torch.bfloat16
    model.to(DEVICE, dtype)
    caches = [build_cache(model.config, 2, 40, DEVICE, dtype, kv_bits) for _ in range(2)]
    idx = torch.randint(61, (2, 26), device=DEVICE)
    for cache in caches:
        cache.fixed_shapes = True
        model.prefill(idx[:, :20], cache, torch.tensor([20, 7]))
    assert step_triton.supports(model, caches[0])
    caches[1].kernel = None
    for i in range(20, 26):
        got = step_triton.decode_one_token(model, idx[:, i : i + 1], caches[0])
        want = model.decode_one_token(idx[:, i : i + 1], caches[1])
        error = (got - want).float().norm() / want.float().norm()
        assert got.shape == want.shape and error < (0.02 if kv_bits is None else 0.05), (i, error)
    assert caches[0].length == caches[1].length == 26
    assert torch.equal(caches[0].positions, caches[1].positions)


def test_what_does_not_suit():
    config = GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=64)
    model = GPT(config)
    cache = build_cache(config, 1, 16, dtype=torch.bfloat16)
    cache.kernel = object()
    assert not step_triton.supports(model, cache)  # float32
    model = model.bfloat16()
    assert step_triton.supports(model, cache)
    cache.batch_size = step_triton.MOST_SEQUENCES + 1
    assert not step_triton.supports(model, cache)
    cache.batch_size, model.lm_head = 1, torch.nn.Linear(65, 64).bfloat16()
    assert not step_triton.supports(model, cache)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from leangpt.decoding import step_triton
from leangpt.kv_cache import cache_triton

def build(kernel, types, constants, warps):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))

for bits, group, half, rope, dtype in ((16, 1, 32, True, "bf16"), (8, 3, 16, False, "fp16"),
                                       (4, 4, 64, True, "bf16"), (4, 1, 32, False, "fp16")):
    types = {name: "*" + dtype for name in ("q", "new_k", "new_v", "recent_k", "recent_v", "out")}
    types |= {name: "*" + (dtype if bits == 16 else "u8") for name in ("rows_k", "rows_v")}
    types |= dict(cos="*fp32", sin="*fp32", meta_k="*fp16", meta_v="*fp16", words_k="*i64",
                  words_v="*i64", positions="*i64", partial="*fp32", top_total="*fp32",
                  arrived="*i32", S="i32", W="i32", scale="fp32")
    types |= {n: "i32" for n in cache_triton.attend_kernel.arg_names if n.startswith("stride_")}
    constants = dict(G=2, GROUP=group, PADDED=8, HALF=half, BITS=bits, R=300 if bits == 16 else 16,
                     ROPE=rope, BLOCK=cache_triton.LAUNCH[bits][0])
    build(cache_triton.attend_kernel, types, constants, cache_triton.LAUNCH[bits][1])
for inner, norm, activation in ((0, 1, 1), (0, 2, 3), (8, 1, 2), (4, 0, 3)):
    pointers = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual", "out")
    types = {name: "*bf16" for name in pointers} | dict(scale_zero="*i32", N="i32", eps="fp32")
    if inner:
        types["weight"] = "*i32"
    constants = dict(K=768 if inner != 4 else 576, K_PADDED=1024, BLOCK_N=16, INNER=inner,
                     BLOCK_K=256 if inner != 4 else 64, GROUP=32, NORM=norm, NORM_BIAS=True,
                     BIAS=True, ACTIVATION=activation, RESIDUAL=not norm)
    build(step_triton.linear_kernel, types, constants, step_triton.WARPS)
"""


@pytest.mark.skipif(cache_triton.triton is None, reason="needs Triton")
def test_the_real_compiler_takes_the_kernels():
    """Without a GPU: the interpreter accepts what the compiler for an H100 refuses."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
