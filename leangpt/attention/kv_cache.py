"""What decoding remembers of the past: one cache a model, one layer of it a block.

The attention policy chooses what a layer stores for a token (numbers a token and layer):

    cache      keys and values of all H heads            2 C
    grouped    keys and values of G < H heads            2 G D
    recompute  the attention's normed input x            C    (K, V are computed again from it)

`kv_bits=8|4` stores the same rows as integers, with a scale and a zero for each half of a head;
the newest RECENT tokens stay exact. All buffers are allocated once and written in place.

How the model uses it, in `prefill` (t > 1) and `decode_one_token` (t = 1) alike:

    positions = cache.begin(t)              # (t,) or (B, t) int64: for wpe or rope
    for block, layer in zip(blocks, cache.layers):
        layer.append(k, v, x_norm)          # k, v (B, G, t, D) after rope; x_norm (B, t, C)
        y = layer.attend(q, block.attn)     # (B, H, t, D) -> (B, H, t, D)
    cache.advance(t)

`layer.needs` is "kv" or "x": what append reads; the other argument may be None, and under "x" a
step need not compute k and v at all. `attn` is read by `recompute` only: `attn.project_kv(x
(B, n, C), positions) -> k, v (B, G, n, D)` and `attn.c_attn`. A prefill of the empty cache may
attend by itself, exactly as in training, and only append, also tile by tile in any order:
`append(..., start=row, batch=slice)`.

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

from leangpt.attention import kv_cache_triton
from leangpt.system import huge_pages
from leangpt.system.errors import UserError

RECENT = 16  # newest tokens that a quantised cache also keeps exactly
TILE = 4096  # rows dequantised or recomputed at a time
ALL = slice(None)
SMALLEST_SPAN = 256  # fixed shapes start at this many slots and double


class Rows:
    """data (B, G, S, D): rows in the model's own dtype; slot s of S holds one token's row."""

    def __init__(self, data):
        self.data = data

    def write(self, slots, rows, newest, batch):
        """Put rows (b, G, t, D) of batch, a slice, at slots: a slice, or (B, 1, 1, 1), t = 1."""
        put(self.data, slots, rows, batch)

    def read(self, start, stop, exact=None):
        """Rows start:stop, (B, G, stop - start, D), as a view."""
        return self.data[:, :, start:stop]

    def tensors(self):
        return [self.data]


class QuantizedRows:
    """The same rows in 8 or 4 bits, x ~ code * scale + zero, beside an exact ring of the newest.

    codes (B, G, S, D) uint8, or (B, G, S, D/2) with number i in the low and number i + D/2 in the
    high half of byte i; scale_zero (B, G, S, 4) float16: scale, zero of numbers [0, D/2), then of
    the others; recent (B, G, RECENT, D).
    """

    def __init__(self, batch, heads, slots, width, device, dtype, bits):
        if width % 2:
            raise UserError(f"kv_bits={bits} halves each head: its size {width} is odd")
        self.bits, self.levels = bits, 2**bits - 1
        shape = (batch, heads, slots)
        self.codes = torch.zeros(*shape, width * bits // 8, device=device, dtype=torch.uint8)
        self.scale_zero = torch.zeros(*shape, 4, device=device, dtype=torch.float16)
        self.recent = torch.zeros(batch, heads, RECENT, width, device=device, dtype=dtype)

    def write(self, slots, rows, newest, batch):
        """As Rows.write; newest: the slot after the last of this step's, where slots is a slice."""
        codes, scale_zero = self.quantize(rows)
        put(self.codes, slots, codes, batch)
        put(self.scale_zero, slots, scale_zero, batch)
        if isinstance(slots, slice):
            first = max(slots.start, newest - RECENT)  # older ones would only be overwritten
            if first < slots.stop:
                ring = torch.arange(first, slots.stop, device=rows.device) % RECENT
                self.recent[batch].index_copy_(2, ring, rows[:, :, first - slots.start :])
        else:
            put(self.recent, slots % RECENT, rows, batch)

    def quantize(self, rows):
        """(B, G, t, D) -> codes (B, G, t, D or D/2) uint8, scale_zero (B, G, t, 4) float16."""
        x = rows.float().unflatten(-1, (2, -1))  # (B, G, t, 2, D/2)
        low, high = x.aminmax(dim=-1, keepdim=True)
        zero = low.half()
        scale = ((high - zero) / self.levels).clamp_(min=1e-7).half()
        codes = ((x - zero) / scale + 0.5).floor_().clamp_(0, self.levels).to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., 0, :] | (codes[..., 1, :] << 4)
        else:
            codes = codes.flatten(-2)
        return codes, torch.cat([scale, zero], dim=-1).flatten(-2)

    def read(self, start, stop, exact):
        """Rows start:stop, dequantised, but the recent ones where exact (B|1, visible)."""
        codes = self.codes[:, :, start:stop]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-2)  # (B, G, n, 2, D/2)
        else:
            codes = codes.unflatten(-1, (2, -1))
        dtype = self.recent.dtype
        scale_zero = self.scale_zero[:, :, start:stop].to(dtype).unflatten(-1, (2, 2, 1))
        scale, zero = scale_zero.unbind(-2)  # (B, G, n, 2, 1) each
        x = torch.addcmul(zero, codes.to(dtype), scale).flatten(-2)
        ring = torch.arange(start, stop, device=x.device) % RECENT
        exact = exact[:, None, start:stop, None]
        return torch.where(exact, self.recent[:, :, ring], x)

    def tensors(self):
        return [self.codes, self.scale_zero]


def put(buffer, slots, rows, batch):
    """buffer (B, G, S, D) gets rows (b, G, t, D) at a slice, or at one slot a batch row."""
    if isinstance(slots, slice):
        buffer[batch, :, slots] = rows
    else:
        slots = slots.expand(-1, buffer.size(1), -1, buffer.size(3))
        buffer.scatter_(2, slots, rows.to(buffer.dtype))


class KeysValues:
    """A layer that stores keys and values with G heads (policies cache and grouped)."""

    needs = "kv"

    def __init__(self, cache, keys, values):
        self.cache, self.keys, self.values = cache, keys, values

    def append(self, k, v, x_norm=None, start=0, batch=ALL):
        """Store k, v (b, G, n, D): rows start.. of this step's t tokens, of the slice `batch`."""
        if self.cache.fused:
            self.new = k, v  # the kernel that attends stores them
            return
        slots, newest = self.cache.slots_of(start, k.size(2))
        self.keys.write(slots, k, newest, batch)
        self.values.write(slots, v, newest, batch)

    def attend(self, q, attn=None):
        """q (B, H, t, D), the queries of the tokens just appended -> (B, H, t, D)."""
        cache = self.cache
        if cache.fused:
            return kv_cache_triton.attend_token(q, *self.new, self.keys, self.values, cache)
        out = attend_tiles(fold_groups(q, cache.kv_heads), cache, self.keys_values)
        return out.reshape(q.shape)

    def keys_values(self, start, stop):
        return (
            self.keys.read(start, stop, self.cache.exact),
            self.values.read(start, stop, self.cache.exact),
        )

    def tensors(self):
        return self.keys.tensors() + self.values.tensors()


class Inputs:
    """A layer that stores the attention's input, C numbers a token (policy recompute)."""

    needs = "x"

    def __init__(self, cache, rows):
        self.cache, self.rows = cache, rows

    def append(self, k, v, x_norm, start=0, batch=ALL):
        """Store x_norm (b, n, C): rows start.. of this step's t tokens, of the slice `batch`."""
        slots, newest = self.cache.slots_of(start, x_norm.size(1))
        heads = self.rows.tensors()[0].size(1)
        rows = x_norm.unflatten(-1, (heads, -1)).transpose(1, 2)  # (b, heads, n, C / heads)
        self.rows.write(slots, rows, newest, batch)

    def attend(self, q, attn):
        """q (B, H, t, D) -> (B, H, t, D), with K and V from the stored inputs."""
        if not self.cache.rotates and isinstance(attn.c_attn, torch.nn.Linear):
            return self.attend_absorbed(q, attn)

        def keys_values(start, stop):
            return attn.project_kv(self.read(start, stop), self.cache.positions_of(start, stop))

        folded = fold_groups(q, self.cache.kv_heads)
        return attend_tiles(folded, self.cache, keys_values).reshape(q.shape)

    def attend_absorbed(self, q, attn):
        """Attention over x itself: q (W_k x) = (q W_k) x, and sum p (W_v x) = W_v sum p x.

        Without rope nothing stands between the weights and x, so K and V never exist: a token
        costs H C multiplications for each of scores and values instead of 2 C G D for K and V.
        A key bias adds the same to all of a query's scores and falls out of the softmax.
        """
        B, H, t, D = q.shape
        G, C = self.cache.kv_heads, attn.c_attn.in_features
        w_k, w_v = attn.c_attn.weight[-2 * G * D :].view(2, G, D, C)
        folded = fold_groups(q, G) @ w_k  # (B, G, g t, C)
        folded = folded.view(B, 1, H * t, C)  # one "head": every query reads the same rows
        mixed = attend_tiles(
            folded, self.cache, lambda i, j: (self.read(i, j)[:, None],) * 2, scale=D**-0.5
        )
        out = mixed.reshape(B, G, -1, C) @ w_v.transpose(1, 2)  # (B, G, g t, D)
        if attn.c_attn.bias is not None:
            out = out + attn.c_attn.bias[-G * D :].view(G, 1, D)
        return out.reshape(q.shape)

    def read(self, start, stop):
        """Stored inputs of slots start:stop, (B, n, C)."""
        return self.rows.read(start, stop, self.cache.exact).transpose(1, 2).flatten(2)

    def tensors(self):
        return self.rows.tensors()


def fold_groups(q, heads):
    """(B, H, t, D) -> (B, G, g t, D): the g query heads of a key head as rows of one product."""
    B, H, t, D = q.shape
    return q.reshape(B, heads, H // heads * t, D)


def attend_tiles(q, cache, read, scale=None):
    """Softmax attention of q (B, G, n_q, D) over the visible slots, read(start, stop) at a time.

    One tile is one fused call. More are merged exactly, in float32, by their logsumexps
    (online softmax: Milakov & Gimelshein 2018, arXiv 1805.02867).
    """
    tile = cache.tile or cache.visible
    tiles = range(0, cache.visible, tile)
    mask = cache.mask  # (B|1, 1, 1|t, visible) bool or None
    if mask is not None and mask.size(2) > 1:
        mask = mask.repeat(1, 1, q.size(2) // mask.size(2), 1)  # the same rows for each of g heads
    if len(tiles) == 1:
        k, v = read(0, cache.visible)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = top = total = None
    for start in tiles:
        stop = min(start + tile, cache.visible)
        k, v = read(start, stop)
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

    def __init__(self, config, batch_size, max_length, device, quantized):
        self.batch_size, self.max_length, self.quantized = batch_size, max_length, quantized
        self.rolling, self.rotates = config.position != "learned", config.position == "rope"
        self.kv_heads = config.kv_heads
        self.tile = None  # stored rows are read as one view; derived ones TILE at a time
        # a quantised row's place in the exact ring must survive the wrap: S a multiple of RECENT
        self.slot_count = -(-max_length // RECENT) * RECENT if quantized else max_length
        self.layers = []
        self.length = 0  # tokens seen by the longest row
        self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.counter = torch.arange(self.slot_count, device=device)
        self.fixed_shapes = False  # set it before a step to be captured
        self.ragged = False  # rows have unequal lengths
        self.suits_kernels = False  # may Triton's kernel take one-token steps?
        self.arrived = None  # (B G,) int32 zeros, the kernel's own counts
        # of the step under way, from begin:
        self.fused = False  # the kernels take it
        self.slots = None  # where its tokens go: a slice, or (B, 1, 1, 1)
        self.visible = 0  # slots it looks at
        self.step = None  # (B|1, t) positions
        self._mask = self._age = None

    @property
    def span(self):
        """Slots that a fixed-shape step looks at; a captured step is stale once this changes."""
        if self.suits_kernels:
            return self.slot_count  # the kernels stop at each row's length by themselves
        span = SMALLEST_SPAN
        while span < min(self.length + 1, self.slot_count):
            span *= 2
        return min(span, self.slot_count)

    def begin(self, t):
        """Make ready for t new tokens a row; returns their positions, (t,) or (B, t) int64.

        Raises UserError where they do not fit and the cache cannot roll.
        """
        end = self.length + t
        if end > self.max_length and (not self.rolling or t > 1):
            raise UserError(
                f"the cache holds {self.max_length} tokens, {self.length} are taken and {t} more "
                "do not fit: shorten the prompt or build a longer cache"
            )
        self._mask = self._age = None
        if t > 1 and self.ragged:
            raise ValueError("rows of unequal length take one token at a time")
        if t == 1 and (self.fixed_shapes or self.ragged):
            self.fused = self.suits_kernels
            self.step = self.positions[:, None]  # (B, 1)
            if self.fused:  # the kernel finds its slots by itself
                return self.step
            self.step = self.step.clone()  # advance() changes positions
            self.slots = (self.step % self.slot_count)[:, :, None, None]
            self.visible = self.span if self.fixed_shapes else min(end, self.slot_count)
            return self.step
        first = self.length % self.slot_count
        self.fused = False
        self.slots = slice(first, first + t)
        self.visible = min(end, self.slot_count)
        positions = torch.arange(self.length, end, device=self.counter.device)
        self.step = positions[None]
        return positions

    def slots_of(self, start, count):
        """Slots of rows start : start + count of this step, and the one after the step's last."""
        if not isinstance(self.slots, slice):
            return self.slots, None
        first = self.slots.start + start
        return slice(first, first + count), self.slots.stop

    def age(self, positions):
        """How long before positions (B|1, n) each visible slot was written: (B|1, n, visible).

        (p - s) mod S; more than p where the slot was never written.
        """
        return (positions[..., None] - self.counter[: self.visible]) % self.slot_count

    @property
    def newest_age(self):
        """Ages (B|1, visible) as seen by each row's newest token."""
        if self._age is None:
            self._age = self.age(self.step[:, -1:])[:, 0]
        return self._age

    @property
    def exact(self):
        """Slots (B|1, visible) that a quantised cache also holds exactly."""
        return self.newest_age < RECENT if self.quantized else None

    @property
    def mask(self):
        """What this step's tokens may look at, (B|1, 1, t, visible) bool; None where all."""
        wrapped = self.length + 1 > self.max_length and self.slot_count > self.max_length
        if isinstance(self.slots, slice) and self.step.size(1) == 1 and not wrapped:
            return None
        if self._mask is None:
            age = self.age(self.step)
            seen = (age <= self.step[..., None]) & (age < self.max_length)
            self._mask = seen.unsqueeze(1)
        return self._mask

    def positions_of(self, start, stop):
        """The positions of the tokens in slots start:stop, (n,) or (B, n) int64."""
        positions = (self.step[:, -1:] - self.newest_age[:, start:stop]).clamp_(min=0)
        return positions[0] if positions.size(0) == 1 else positions

    def advance(self, t):
        """Count t tokens a row, once every layer has them."""
        self.positions += t
        self.length += t

    def set_lengths(self, lengths):
        """After a right-padded prefill: row b has lengths[b] (B,) real tokens."""
        self.positions.copy_(torch.as_tensor(lengths))
        self.ragged = True

    def reset(self):
        """Forget every token; the buffers stay."""
        self.length, self.ragged = 0, False
        self.positions.zero_()

    @property
    def bytes_per_token(self):
        """Bytes that one token of one row costs in all layers, counted from the real buffers."""
        total = sum(t.numel() * t.element_size() for la in self.layers for t in la.tensors())
        return total // (self.batch_size * self.slot_count)


def build_cache(config, batch_size, max_length, device="cpu", dtype=torch.float32, kv_bits=None):
    """The cache that config.attention_policy asks for, of max_length tokens for each of B rows.

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
    cache = KVCache(config, batch_size, max_length, device, kv_bits is not None)

    recompute = config.attention_policy == "recompute"
    if kv_bits is not None or (recompute and cache.rotates):
        cache.tile = config.k_chunk or TILE
    cache.suits_kernels = not recompute and kv_cache_triton.fits(
        cache.counter.device, config.head_dim, dtype
    )
    if cache.suits_kernels:
        cache.arrived = torch.zeros(batch_size * config.kv_heads, dtype=torch.int32, device=device)

    if not recompute:
        heads, width = config.kv_heads, config.head_dim
    elif kv_bits is None:
        heads, width = 1, config.n_embd
    else:  # scales for each half of D numbers, as keys and values have them
        heads, width = config.n_head, config.head_dim
    shape, count = (batch_size, heads, cache.slot_count, width), config.n_layer * (2 - recompute)
    if kv_bits is None:
        size = math.prod(shape) * dtype.itemsize
        memory = huge_pages.empty(count * size, device).zero_().split(size)
        rows = [Rows(part.view(dtype).view(shape)) for part in memory]
    else:
        rows = [QuantizedRows(*shape, device, dtype, kv_bits) for _ in range(count)]
    if recompute:
        cache.layers = [Inputs(cache, each) for each in rows]
    else:
        cache.layers = [KeysValues(cache, *pair) for pair in zip(rows[::2], rows[1::2])]
    return cache
