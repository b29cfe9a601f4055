"""What decoding remembers of the past: one cache a model, one layer of it a block.

The attention policy chooses what a layer stores for a token (numbers a token and layer):

    cache      keys and values of all H heads            2 C
    grouped    keys and values of G < H heads            2 G D
    recompute  the attention's normed input x            C    (K, V are computed again from it)

`kv_bits=8|4` stores the same rows as integers (rows.py), the newest ones exactly too. All
buffers are allocated once and written in place.

How the model uses it, in `prefill` (t > 1) and `decode_one_token` (t = 1) alike:

    step = cache.begin(t)                   # step.positions: for wpe or rope
    for block, layer in zip(blocks, cache.layers):
        q, k, v = attn.project(x, step.positions, layer.parts)   # as many as layer.parts names
        y = layer.attend_new(step, x, attn, q, k, v)             # (B, H, t, D) -> (B, H, t, D)
    cache.advance(t)

A prefill of the empty cache may attend by itself, exactly as in training, and only `store`, also
tile by tile in any order: `store(step, x, k, v, start=row, batch=slice)`.

Rows of unequal length are padded on the right: the padded prefill is the plain causal one, its
logits are taken at each row's last token, and `set_lengths(lengths)` says how much of each row is
real; decoding overwrites the rest.

Past `max_length` tokens the cache rolls where positions are relative (rope, none): a new token
takes the oldest one's slot, so each layer attends to the newest `max_length` tokens. Learned
positions cannot roll; `generate` starts a new prefill from the cropped text instead.

Shapes: with `fixed_shapes` every index comes from a device tensor and every shape is constant
until `span` grows, so a step can be captured in a CUDA graph. Otherwise the host's own token count
bounds the views, which costs nothing on a CPU.
"""

import math

import torch
from torch.nn import functional as F

from leangpt.kv_cache import cache_triton
from leangpt.kv_cache.rows import ALL, RECENT, ExactRows, QuantizedRows
from leangpt.kv_cache.steps import KernelStep, RowStep, RunStep, Step
from leangpt.system import huge_pages
from leangpt.system.errors import UserError

TILE = 4096  # rows dequantised or recomputed at a time
SMALLEST_SPAN = 256  # fixed shapes start at this many slots and double


class KeysValues:
    """A layer that stores keys and values with G heads (policies cache and grouped)."""

    parts = "qkv"  # what a step must project of its new tokens
    has_kernel = True

    def __init__(self, config, keys, values, tile):
        self.kv_heads, self.keys, self.values, self.tile = config.kv_heads, keys, values, tile

    @staticmethod
    def row_shapes(config, quantized):
        """(heads, numbers) of each kind of row that a layer stores."""
        return [(config.kv_heads, config.head_dim)] * 2

    @staticmethod
    def derives(config):
        """Are keys and values more than views of exact rows?"""
        return False

    def store(self, step, x, k, v, start=0, batch=ALL):
        """Keep k, v (b, G, n, D): rows start.. of the step's t tokens, of the slice `batch`."""
        self.keys.write(step, k, start, batch)
        self.values.write(step, v, start, batch)

    def attend_new(self, step, x, attn, q, k, v):
        """Keep the step's t new tokens and attend from them: q (B, H, t, D), k, v (B, G, t, D).

        -> (B, H, t, D). x and attn are not read here.
        """
        if step.kernel is not None:
            return step.kernel(q, k, v, self.keys, self.values, step.cache)
        self.store(step, x, k, v)
        out = attend_tiles(fold_groups(q, self.kv_heads), step, self.tile, self.keys_values)
        return out.reshape(q.shape)

    def keys_values(self, step, start, stop):
        return self.keys.read(step, start, stop), self.values.read(step, start, stop)

    def tensors(self):
        return self.keys.tensors() + self.values.tensors()


class StoredInputs:
    """A layer that stores the attention's input, C numbers a token (policy recompute)."""

    parts = "q"
    has_kernel = False

    def __init__(self, config, inputs, tile):
        self.kv_heads, self.inputs, self.tile = config.kv_heads, inputs, tile
        self.between = self.derives(config)

    @staticmethod
    def row_shapes(config, quantized):
        """(heads, numbers) of a row: scales for each half of D numbers, as keys and values have
        them, if quantised (and the row can be cut so)."""
        C, D = config.n_embd, config.head_dim
        return [(C // D, D) if quantized and C % D == 0 else (1, C)]

    @staticmethod
    def derives(config):
        """Between the rows and their keys stands rope or a norm, or nothing (attend_absorbed)."""
        return config.position == "rope" or config.qk_norm

    def store(self, step, x, k=None, v=None, start=0, batch=ALL):
        """Keep normed inputs x (b, n, C): rows start.. of the step's t, of the slice `batch`."""
        heads = self.inputs.tensors()[0].size(1)
        rows = x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (b, heads, n, C / heads)
        self.inputs.write(step, rows, start, batch)

    def attend_new(self, step, x, attn, q, k=None, v=None):
        """Keep the step's t new tokens, x (B, t, C) normed, and attend from them: q (B, H, t, D).

        -> (B, H, t, D). attn: its `project(x (B, n, C), positions, "kv") -> k, v (B, G, n, D)` and
        `c_attn` give keys and values.
        """
        self.store(step, x)
        if not self.between and isinstance(attn.c_attn, torch.nn.Linear):
            return self.attend_absorbed(step, attn, q)

        def keys_values(step, start, stop):
            positions = step.positions_of(start, stop)
            return attn.project(self.read(step, start, stop), positions, "kv")

        folded = fold_groups(q, self.kv_heads)
        return attend_tiles(folded, step, self.tile, keys_values).reshape(q.shape)

    def attend_absorbed(self, step, attn, q):
        """Attention over x itself: q (W_k x) = (q W_k) x, and sum p (W_v x) = W_v sum p x.

        Without rope nothing stands between the weights and x, so K and V never exist: a token
        costs H C multiplications for each of scores and values instead of 2 C G D for K and V.
        A key bias adds the same to all of a query's scores and falls out of the softmax.
        """
        B, H, t, D = q.shape
        G, C = self.kv_heads, attn.c_attn.in_features
        w_k, w_v = attn.c_attn.weight[-2 * G * D :].view(2, G, D, C)
        folded = fold_groups(q, G) @ w_k  # (B, G, g t, C)
        folded = folded.view(B, 1, H * t, C)  # one "head": every query reads the same rows
        mixed = attend_tiles(
            folded,
            step,
            self.tile,
            lambda step, i, j: (self.read(step, i, j)[:, None],) * 2,
            scale=D**-0.5,
        )
        out = mixed.reshape(B, G, -1, C) @ w_v.transpose(1, 2)  # (B, G, g t, D)
        if attn.c_attn.bias is not None:
            out = out + attn.c_attn.bias[-G * D :].view(G, 1, D)
        return out.reshape(q.shape)

    def read(self, step, start, stop):
        """Stored inputs of slots start:stop, (B, n, C)."""
        return self.inputs.read(step, start, stop).transpose(1, 2).flatten(2)

    def tensors(self):
        return self.inputs.tensors()


def fold_groups(q, heads):
    """(B, H, t, D) -> (B, G, g t, D): the g query heads of a key head as rows of one product."""
    B, H, t, D = q.shape
    return q.reshape(B, heads, H // heads * t, D)


def attend_tiles(q, step, tile, read, scale=None):
    """Softmax attention of q (B, G, n_q, D) over the visible slots, `tile` at a time or all.

    read(step, start, stop) -> k, v (B, G, n, D). One tile is one fused call. More are merged
    exactly, in float32, by their logsumexps (online softmax: Milakov & Gimelshein 2018, arXiv
    1805.02867).
    """
    visible = step.visible
    tile = tile or visible
    tiles = range(0, visible, tile)
    mask = step.mask  # (B or 1, 1, 1 or t, visible) bool, or None
    if mask is not None and mask.size(2) > 1:
        mask = mask.repeat(1, 1, q.size(2) // mask.size(2), 1)  # the same rows for each of g heads
    if len(tiles) == 1:
        k, v = read(step, 0, visible)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = top = total = None
    for start in tiles:
        stop = min(start + tile, visible)
        k, v = read(step, start, stop)
        score = (q @ k.transpose(-1, -2)).to(wide) * scale  # (B, G, n_q, n)
        if mask is not None:
            score = score.masked_fill(~mask[..., start:stop], -1e30)
        tile_top = score.amax(-1, keepdim=True)
        new_top = tile_top if top is None else torch.maximum(top, tile_top)
        p = (score - new_top).exp_()
        tile_out, tile_total = (p.to(v.dtype) @ v).to(wide), p.sum(-1, keepdim=True)
        if top is None:
            out, total = tile_out, tile_total
        else:
            shrink = (top - new_top).exp_()
            out, total = out * shrink + tile_out, total * shrink + tile_total
        top = new_top
    return (out / total).to(q.dtype)


class KVCache:
    """All layers, and the position they share. See the top of the file for how to drive it."""

    def __init__(self, layers, batch_size, max_length, slot_count, device, rolling, kernel=None):
        self.layers, self.batch_size = layers, batch_size
        self.max_length, self.slot_count = max_length, slot_count
        self.rolling = rolling  # may it go on past max_length?
        self.kernel = kernel  # cache_triton.TokenKernel for one-token steps; None: PyTorch
        self.length = 0  # tokens seen by the longest row
        self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.counter = torch.arange(slot_count, device=device)
        self.ragged = False  # rows have unequal lengths
        self.fixed_shapes = False  # set it before a step to be captured
        self.made_for = None  # signature() of the model's config

    def check(self, config, batch_size) -> "KVCache":
        """Itself. Raises UserError where it was made for another shape of model, or for other rows:
        kernels read what they are given."""
        if self.made_for is not None and self.made_for != signature(config):
            raise UserError("this KV cache was made for another model: build one for this one")
        if batch_size != self.batch_size:
            raise UserError(f"a KV cache of {self.batch_size} rows cannot take {batch_size}")
        return self

    @property
    def span(self):
        """Slots that a fixed-shape step looks at; a captured step is stale once this changes."""
        if self.kernel is not None:
            return self.slot_count  # the kernel stops at each row's length by itself
        span = SMALLEST_SPAN
        while span < min(self.length + 1, self.slot_count):
            span *= 2
        return min(span, self.slot_count)

    def begin(self, t: int) -> Step:
        """Make ready for t new tokens a row.

        Raises UserError where they do not fit and the cache cannot roll.
        """
        end = self.length + t
        if end > self.max_length and (not self.rolling or t > 1):
            raise UserError(
                f"the cache holds {self.max_length} tokens, {self.length} are taken and {t} more "
                "do not fit: shorten the prompt or build a longer cache"
            )
        if t > 1 and self.ragged:
            raise ValueError("rows of unequal length take one token at a time")
        if t > 1 or not (self.fixed_shapes or self.ragged):
            return RunStep(self, t)
        if self.kernel is not None:
            return KernelStep(self)
        return RowStep(self, self.span if self.fixed_shapes else min(end, self.slot_count))

    def advance(self, t: int) -> None:
        """Count t tokens a row, once every layer has them."""
        self.positions += t
        self.length += t

    def set_lengths(self, lengths) -> None:
        """After a right-padded prefill: row b has lengths[b] (B,) real tokens."""
        self.positions.copy_(torch.as_tensor(lengths))
        self.ragged = True

    def reset(self, length: int = 0) -> None:
        """Forget every token from `length` on; the buffers stay.

        Rows in 8 or 4 bits have their newest ones exactly: of those it can only be all.
        """
        self.length, self.ragged = length, False
        self.positions.fill_(length)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row costs in all layers, counted from the real buffers."""
        total = sum(t.numel() * t.element_size() for la in self.layers for t in la.tensors())
        return total // (self.batch_size * self.slot_count)


def build_cache(
    config,
    batch_size: int,
    max_length: int,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    kv_bits: int | None = None,
) -> KVCache:
    """The cache that a GPTConfig's policy asks for, of max_length tokens for each of B rows.

    kv_bits: None for rows in dtype, 8 or 4 for quantised rows. UserError on anything else.
    """
    if kv_bits not in (None, 8, 4):
        raise UserError(f"kv_bits={kv_bits}: use 8, 4, or None for an exact cache")
    if batch_size < 1 or max_length < 1:
        raise UserError(f"a cache needs rows and tokens, not {batch_size} x {max_length}")
    if config.position == "learned" and max_length > config.block_size:
        raise UserError(
            f"a cache of {max_length} tokens: the model has learned only "
            f"block_size={config.block_size} positions"
        )
    make = config.policy.cache_layer
    shapes = config.n_layer * make.row_shapes(config, kv_bits is not None)
    if kv_bits is None:
        slots = max_length
        rows = exact_rows(
            [(batch_size, heads, slots, width) for heads, width in shapes], device, dtype
        )
    else:
        slots = -(-max_length // RECENT) * RECENT
        rows = [
            QuantizedRows(batch_size, heads, slots, width, device, dtype, kv_bits)
            for heads, width in shapes
        ]
    # what must be dequantised or projected is so a tile at a time
    tile = config.k_chunk or TILE if kv_bits or make.derives(config) else None
    kinds = len(rows) // config.n_layer
    layers = [make(config, *rows[i : i + kinds], tile=tile) for i in range(0, len(rows), kinds)]
    kernel = None
    if make.has_kernel and cache_triton.supports(torch.device(device), config.head_dim, dtype):
        kernel = cache_triton.TokenKernel(batch_size * config.kv_heads, device)
    rolling = config.position != "learned"
    cache = KVCache(layers, batch_size, max_length, slots, device, rolling, kernel)
    cache.made_for = signature(config)
    return cache


def signature(config):
    """What of a GPTConfig decides how a cache is laid out."""
    sizes = config.n_layer, config.n_embd, config.n_head, config.kv_heads
    return *sizes, config.position, config.attention_policy


def exact_rows(shapes, device, dtype):
    """ExactRows of zeros of equal shapes, in one block of memory, of huge pages where there are."""
    size = math.prod(shapes[0]) * dtype.itemsize
    memory = huge_pages.empty(len(shapes) * size, device).zero_().split(size)
    return [ExactRows(part.view(dtype).view(shape)) for part, shape in zip(memory, shapes)]
