"""Row tiles around the decoder layers of a Hugging Face model: Llama, Mistral, Qwen2, Qwen3.

    from leangpt.attention import tile_layers

    model = AutoModelForCausalLM.from_pretrained(...)
    tile_layers(model)

From then on each layer trains tile by tile and saves its input alone for backward, exactly:
outputs and gradients are the original's. Weights, their names and the state dict stay as they are,
so saving, LoRA and optimizers see no difference. The library's own gradient checkpointing has
nothing left to do.

The logits of a long sequence may be the next peak: see leangpt.layers.chunked_cross_entropy.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from leangpt.attention.block_tiles import run_tiles
from leangpt.attention.kv_source import RecomputedRows, attend, row_positions
from leangpt.attention.offload import HostStack
from leangpt.attention.tile_sizes import default_chunk, tile_sizes
from leangpt.system.errors import UserError

# classes whose layers are: norm, attention, residual, norm, MLP, residual
KNOWN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer's numbers and how it is to be tiled (protocol.BlockShape)."""

    n_embd: int
    n_head: int
    kv_heads: int
    head_dim: int
    source: Any
    q_chunk: int | None
    k_chunk: int | None
    checkpoint_layers: bool


class DecoderLayerRows:
    """One call of a decoder layer, as tiles want it (protocol.TileableBlock)."""

    compiled = None
    residual_dropout = 0.0  # these models have none

    def __init__(self, layer, shape, rotation, offload=None):
        """rotation: the rotary cos and sin (T, D) of this call's rows."""
        self.layer, self.config, self.offload = layer, shape, offload
        self.rotation = rotation

    @property
    def attention_dropout(self):
        return self.layer.self_attn.attention_dropout if self.layer.training else 0.0

    def parameters(self):
        return self.layer.parameters()

    def project(self, x, positions, parts="qkv", heads=None):
        attn = self.layer.self_attn
        x = self.layer.input_layernorm(x)
        return tuple(self._part(attn, part, x, positions, heads) for part in parts)

    def _part(self, attn, part, x, positions, heads):
        """One of q, k, v, (B, n, t, D), of normed rows x (B, t, C)."""
        y = some_heads(getattr(attn, f"{part}_proj"), x, heads, self.config.kv_heads)
        y = y.unflatten(-1, (-1, self.config.head_dim))
        if part == "v":
            return y.transpose(1, 2)
        dtype, norm = y.dtype, getattr(attn, f"{part}_norm", None)  # Qwen3 has one
        y = (y if norm is None else norm(y)).transpose(1, 2)
        # under autocast the tables, and so the product, are wider than v
        return rotate(y, *(table[positions] for table in self.rotation)).to(dtype)

    def finish(self, x, y):
        x = x + self.layer.self_attn.o_proj(y.transpose(1, 2).flatten(2))
        del y
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))

    def plain(self, x):
        positions = row_positions(0, x.size(1), x.device)
        return self.finish(x, attend(*self.project(x, positions), self.attention_dropout))


def some_heads(linear, x, heads, kv_heads):
    """linear(x), or of key/value heads [first, stop) alone: x (B, t, C) -> (B, t, n D)."""
    if heads is None:
        return linear(x)
    first, stop = heads
    if type(linear) is not nn.Linear:  # an adapter, or packed weights
        return linear(x).unflatten(-1, (kv_heads, -1))[..., first:stop, :].flatten(-2)
    size = linear.out_features // kv_heads
    rows = slice(first * size, stop * size)
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def rotate(x, cos, sin):
    """Rotary positions as these models have them: x (B, n, t, D), cos and sin (t, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def tile_layers(
    model: nn.Module,
    q_chunk: int | None = None,
    k_chunk: int | None = None,
    source: type = RecomputedRows,
    checkpoint_layers: bool = True,
    offload: bool = False,
) -> nn.Module:
    """Run the decoder layers of a Hugging Face model tile by tile; returns the model, changed.

    q_chunk, k_chunk: rows and key/value rows per tile; None: chosen from the width. source: where
    keys and values come from, RecomputedRows or StoredRows (faster, 2 G D numbers a token more).
    checkpoint_layers: save a layer's input only, else attention's output too. offload: keep those
    inputs in pinned host memory (CUDA).

    Tiled are calls over whole sequences with causal attention, no padding and no KV cache. While
    training a cache is not filled, as under the library's gradient checkpointing; to evaluate long
    texts pass use_cache=False. Any other call runs the layer as it was, with a warning if it is
    longer than a tile. Attention that builds its own mask ("eager") becomes "sdpa".

    Raises UserError for a model without such layers, for sliding windows and attention scaled
    otherwise than by 1 / sqrt(D); while training, for attention dropout.
    """
    layers = [layer for layer in model.modules() if type(layer).__name__ in KNOWN]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layers that can be tiled ({', '.join(KNOWN)})"
        )
    for layer in layers:
        check_layer(layer)
    config = layers[0].self_attn.config
    if config._attn_implementation == "eager":
        config._attn_implementation = "sdpa"
    stack = HostStack() if offload else None
    for layer in layers:
        shape = LayerShape(
            n_embd=config.hidden_size,
            n_head=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=layer.self_attn.head_dim,
            source=source,
            q_chunk=q_chunk,
            k_chunk=k_chunk,
            checkpoint_layers=checkpoint_layers,
        )
        # an attribute of the instance, so that class and names are the model's own
        layer.forward = partial(tiled_forward, layer, shape, stack)
    return model


def check_layer(layer):
    """Raise UserError for a decoder layer whose attention is not plainly causal."""
    attn = layer.self_attn
    owner = attn if hasattr(attn, "sliding_window") else attn.config
    window = getattr(owner, "sliding_window", None)
    if window:
        raise UserError(f"a sliding window of {window} tokens cannot be tiled: set it to None")
    if abs(attn.scaling * attn.head_dim**0.5 - 1) > 1e-6:
        raise UserError(f"attention scaled by {attn.scaling:g}, not 1 / sqrt({attn.head_dim})")


def tiled_forward(
    layer, shape, stack, hidden_states, attention_mask=None, position_embeddings=None, **kwargs
):
    """A decoder layer's forward: hidden_states (B, T, C) -> (B, T, C)."""
    T = hidden_states.size(1)
    training = layer.training and torch.is_grad_enabled()
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    odd = None  # why it cannot be tiled
    if attention_mask is not None:
        odd = "an attention mask"
    elif position_embeddings[0].size(0) != 1:
        odd = "positions that differ between sequences"
    elif cache is not None and not training:
        odd = "a KV cache"
    sizes = None if odd else tile_sizes(shape, T, hidden_states.device.type)
    if sizes is None:
        if odd and T > (shape.q_chunk or default_chunk(shape, hidden_states.device.type)):
            warnings.warn(f"{T} tokens with {odd}: the layers run untiled", stacklevel=2)
        return type(layer).forward(
            layer,
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    rotation = [table[0] for table in position_embeddings]
    return run_tiles(DecoderLayerRows(layer, shape, rotation, stack), hidden_states, sizes)
