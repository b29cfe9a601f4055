"""A decoding step on the CPU as one call of C, step_cpu.c, which loops over the blocks.

A step of a small model takes a few milliseconds, of which a Python loop over a dozen operators a
block takes half: what each costs to call, and the weights' stream through memory broken off by it.
`Step` writes down once where weights and caches lie; each call then hands over the embedded tokens
and their positions. The residual stream stays float32 from block to block.

Takes the policies cache and grouped with exact keys and values, weights in 4 bits, bfloat16 or
float32; the rest goes through model.decode_one_token.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import nn

from leangpt.kv_cache.cache import KeysValues
from leangpt.kv_cache.rows import ExactRows
from leangpt.layers import linear_cpu
from leangpt.layers.int4_layouts import LAYOUTS
from leangpt.layers.int4_linear import Int4Linear
from leangpt.layers.linear_cpu import HALF, LinearArguments
from leangpt.layers.rope import rope_table

SOURCE = Path(__file__).with_name("step_cpu.c")
WIDEST_HEAD = 256
FEW_ROWS = {"plain": 1, "vnni": LAYOUTS["vnni"].few_rows}  # most sequences, by kind of weights
NORMS = ("layernorm", "rmsnorm")
MLPS = ("gelu", "gelu_tanh", "swiglu")
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64


@functools.cache
def library():
    """The step, built if need be; None where it cannot run."""
    loaded = linear_cpu.load(SOURCE)
    if loaded is not None:
        loaded.decode.argtypes = [POINTER] * 4 + [NUMBER] + [POINTER] * 2
        loaded.decode.restype = None
    return loaded


class NormArguments(ctypes.Structure):
    """struct norm of step_cpu.c."""

    _fields_ = [("weight", POINTER), ("bias", POINTER)]


class BlockArguments(ctypes.Structure):
    """struct block of step_cpu.c."""

    _fields_ = [
        *((name, NormArguments) for name in ("ln_1", "ln_2", "q_norm", "k_norm")),
        *((name, LinearArguments) for name in ("c_attn", "c_proj", "c_fc", "mlp_proj")),
        ("keys", POINTER),
        ("values", POINTER),
    ]


class ModelArguments(ctypes.Structure):
    """struct model of step_cpu.c."""

    _fields_ = [
        *(
            (name, NUMBER)
            for name in ("L", "B", "C", "H", "G", "D", "S", "inner", "half", "norm", "mlp")
        ),
        ("eps", ctypes.c_double),
        ("blocks", POINTER),
        ("ln_f", NormArguments),
        ("head", LinearArguments),
    ]


class Step:
    """model.decode_one_token for one model and one cache that `supports` has approved of."""

    def __init__(self, model, cache):
        self.model, self.cache, config = model, cache, model.config
        blocks = [
            BlockArguments(
                norm(block.ln_1),
                norm(block.ln_2),
                norm(block.attn.q_norm),
                norm(block.attn.k_norm),
                linear(block.attn.c_attn),
                linear(block.attn.c_proj),
                linear(block.mlp.c_fc),
                linear(block.mlp.c_proj),
                layer.keys.data.data_ptr(),
                layer.values.data.data_ptr(),
            )
            for block, layer in zip(model.transformer.h, cache.layers)
        ]
        self.blocks = (BlockArguments * len(blocks))(*blocks)
        self.arguments = ModelArguments(
            len(blocks),
            cache.batch_size,
            config.n_embd,
            config.n_head,
            config.kv_heads,
            config.head_dim,
            cache.slot_count,
            config.inner,
            HALF[model.transformer.wte.weight.dtype],
            NORMS.index(config.norm),
            MLPS.index(config.mlp),
            config.norm_eps,
            ctypes.addressof(self.blocks),
            norm(model.transformer.ln_f),
            linear(model.lm_head),
        )

    def __call__(self, idx, cache):
        """One more token a row, idx (B, 1), after the cache's others -> logits (B, V) float32."""
        assert cache is self.cache
        config = self.model.config
        positions = cache.begin(1).positions
        x = self.model.embed(idx, positions).contiguous()
        positions = positions.flatten()  # (B,) or (1,)
        cos = sin = None
        if config.position == "rope":
            table = rope_table(config.head_dim, positions, config.rope_theta, config.rope_scaling)
            cos, sin = (part.contiguous() for part in table)
        logits = torch.empty(len(idx), config.vocab_size)
        library().decode(
            ctypes.addressof(self.arguments),
            x.data_ptr(),
            logits.data_ptr(),
            positions.data_ptr(),
            len(positions) > 1,
            cos if cos is None else cos.data_ptr(),
            sin if sin is None else sin.data_ptr(),
        )
        cache.advance(1)
        return logits


def norm(layer):
    """The addresses of a Norm; none of None."""
    if layer is None:
        return NormArguments(None, None)
    return NormArguments(
        layer.weight.data_ptr(), None if layer.bias is None else layer.bias.data_ptr()
    )


def linear(layer):
    """The addresses and sizes of a linear layer, float or 4-bit."""
    bias = None if layer.bias is None else layer.bias.data_ptr()
    sizes = layer.out_features, layer.in_features
    if isinstance(layer, Int4Linear):
        return LinearArguments(
            layer.packed.data_ptr(), layer.scale_zero.data_ptr(), bias, *sizes, layer.group_size
        )
    return LinearArguments(layer.weight.data_ptr(), None, bias, *sizes, 0)


def supports(model, cache):
    """Whether Step can take this model's steps into this cache."""
    config, weight = model.config, model.transformer.wte.weight
    linears = [model.lm_head] + [
        layer
        for block in model.transformer.h
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    ]
    rows = min(FEW_ROWS["vnni" if isinstance(layer, Int4Linear) else "plain"] for layer in linears)
    return (
        weight.device.type == "cpu"
        and weight.dtype in HALF
        and library() is not None
        and not model.training
        and not torch.is_autocast_enabled("cpu")
        and cache.batch_size <= rows
        and all(supports_linear(layer) for layer in linears)
        and all(
            isinstance(layer, KeysValues)
            and isinstance(layer.keys, ExactRows)
            and layer.keys.data.dtype == weight.dtype
            for layer in cache.layers
        )
        and all(p.dtype == weight.dtype and p.is_contiguous() for p in model.parameters())
        and config.head_dim % 16 == 0
        and config.head_dim <= WIDEST_HEAD
    )


def supports_linear(layer):
    """Does step_cpu.c multiply by this layer?"""
    if isinstance(layer, Int4Linear):
        return layer.layout == "vnni"
    return type(layer) is nn.Linear and layer.in_features % 16 == 0
