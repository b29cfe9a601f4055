"""A decoding step of few rows on CUDA in five kernels a block, in Triton.

    q, k, v = c_attn(norm(x))          one kernel: the norm is computed again by each program
    y = attention(rope(q, k), v)       one kernel, which also stores k and v (cache_triton.py)
    x = x + c_proj(y)                  one kernel
    h = activation(c_fc(norm(x)))      one kernel
    x = x + mlp.c_proj(h)              one kernel

One token of a small model is not much work: a GPU spends the step's time on starting kernels and
on waiting for their first bytes, so what counts is few kernels that ask for their weights at once.
A program holds its whole tile of weights in registers; its loads are under way while it computes
the norm. Products and sums are float32, rounded to the model's dtype once a kernel.

The linears may be nn.Linear or 4-bit ones (layers/int4_linear.py) in the order of PyTorch's
tensor-core kernel. That order is not documented, so `word_order_known` tries it before it is relied
upon.
"""

import functools

import torch
from torch import nn

from leangpt.layers.int4_linear import Int4Linear
from leangpt.layers.rope import rope_table
from leangpt.system.triton import tl, triton

MOST_SEQUENCES = 4  # at once; more are better served by matrix products
TILE = 12288  # weights a program holds
LEAST_PROGRAMS = 128  # about one for each of an H100's 132 processors
WARPS = 4
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "swiglu": 3}
NORMS = {None: 0, "layernorm": 1, "rmsnorm": 2}
aten = torch.ops.aten


if triton is not None:

    @triton.jit
    def norm_statistics(x, eps, NORM: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr):
        """Mean (0 for RMSNorm) and 1 / deviation of x (K,)."""
        columns = tl.arange(0, K_PADDED)
        row = tl.load(x + columns, columns < K, 0.0).to(tl.float32)
        mean = 0.0
        if NORM == 1:
            mean = tl.sum(row, 0) / K
        centred = tl.where(columns < K, row - mean, 0.0)
        return mean, tl.rsqrt(tl.sum(centred * centred, 0) / K + eps)

    @triton.jit
    def normed(
        row, k, mean, rstd, norm_weight, norm_bias, NORM: tl.constexpr, NORM_BIAS: tl.constexpr
    ):
        """row, the numbers k of x, normed in float32 and rounded as norm layers do."""
        if NORM:
            dtype = row.dtype
            row = (row.to(tl.float32) - mean) * rstd * tl.load(norm_weight + k).to(tl.float32)
            if NORM_BIAS:
                row += tl.load(norm_bias + k).to(tl.float32)
            row = row.to(dtype)
        return row.to(tl.float32)

    @triton.jit
    def load_tiles(weight, n, mask, K: tl.constexpr, BLOCK_K: tl.constexpr):
        """Rows n of weight (N, K): a tuple of (BLOCK_N, BLOCK_K) tiles, all asked for at once."""
        tiles = ()
        for first in tl.static_range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            tile = tl.load(
                weight + n[:, None] * K + k[None, :],
                mask[:, None],
                0.0,
                eviction_policy="evict_first",
            )
            tiles = tiles + (tile,)
        return tiles

    @triton.jit
    def load_words(words, n, mask, K: tl.constexpr, BLOCK_K: tl.constexpr, INNER: tl.constexpr):
        """Rows n of 4-bit weights: a tuple of (BLOCK_N, BLOCK_K / 8) tiles of words of 8 codes."""
        tiles = ()
        together: tl.constexpr = 2 * INNER  # words of a row that lie together: 4 lanes, INNER / 2
        j = tl.arange(0, BLOCK_K // 8)
        for first in tl.static_range(0, K, BLOCK_K):
            outer = first // (16 * INNER) + j // together
            at = ((n // 8)[:, None] * (K // (16 * INNER)) + outer[None, :]) * (8 * together)
            at += (n % 8)[:, None] * together + (j % together)[None, :]
            tiles = tiles + (tl.load(words + at, mask[:, None], 0, eviction_policy="evict_first"),)
        return tiles

    @triton.jit
    def times_tiles(
        tiles,
        x,
        mean,
        rstd,
        norm_weight,
        norm_bias,
        NORM: tl.constexpr,
        NORM_BIAS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """Products of the tiles' rows with x, normed: (BLOCK_N,) float32."""
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for i in tl.static_range(0, len(tiles)):
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)
            row = normed(tl.load(x + k), k, mean, rstd, norm_weight, norm_bias, NORM, NORM_BIAS)
            total += tiles[i].to(tl.float32) * row[None, :]
        return tl.sum(total, 1)

    @triton.jit
    def eight_of(row):
        """row (width, one, high, eight), two each -> the 8 inputs of each word, by their bits."""
        a, b = tl.split(row)  # by eight
        a0, a1 = tl.split(a)
        b0, b1 = tl.split(b)
        p0, p4 = tl.split(a0)
        p2, p6 = tl.split(a1)
        p1, p5 = tl.split(b0)
        p3, p7 = tl.split(b1)
        return p0, p1, p2, p3, p4, p5, p6, p7

    @triton.jit
    def times_words(
        tiles,
        x,
        scale_zero,
        n,
        mask,
        N_ALL,
        mean,
        rstd,
        norm_weight,
        norm_bias,
        NORM: tl.constexpr,
        NORM_BIAS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        INNER: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        """The same for words of 4-bit codes; scale_zero (K / GROUP, N_ALL) int32: two bfloat16.

        A word holds inputs k, k + 8, k + 16, k + 24 of a row in its low half, lowest bits first,
        and k + 1, k + 9, k + 17, k + 25 in its high half, k a multiple of 2: all of one group.
        Two codes at a time become bfloat16 by being set as the last bits of 128.
        """
        width: tl.constexpr = BLOCK_K // 8
        j = tl.arange(0, width)
        total = tl.zeros((BLOCK_N, width), tl.float32)
        for i in tl.static_range(0, len(tiles)):
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)
            row = normed(tl.load(x + k), k, mean, rstd, norm_weight, norm_bias, NORM, NORM_BIAS)
            # outer, word, high, eight, lane, one
            row = tl.reshape(row, (BLOCK_K // (16 * INNER), INNER // 2, 2, 2, 4, 2))
            row = tl.reshape(tl.permute(row, (0, 4, 1, 5, 2, 3)), (width, 2, 2, 2))
            inputs = eight_of(row)
            product = tl.zeros((BLOCK_N, width), tl.float32)
            row_sum = tl.zeros((width,), tl.float32)
            for nibble in tl.static_range(0, 4):
                pair = ((tiles[i] >> (4 * nibble)) & 0x000F000F) | 0x43004300
                low = (pair << 16).to(tl.float32, bitcast=True)
                high = (pair & -65536).to(tl.float32, bitcast=True)
                product += low * inputs[nibble][None, :] + high * inputs[nibble + 4][None, :]
                row_sum += inputs[nibble] + inputs[nibble + 4]
            outer, word = j // (2 * INNER), j % (INNER // 2)
            group = (i * BLOCK_K + outer * (16 * INNER) + word * 32) // GROUP
            pair = tl.load(scale_zero + group[None, :] * N_ALL + n[:, None], mask[:, None], 0)
            scale = (pair << 16).to(tl.float32, bitcast=True)
            zero = (pair & -65536).to(tl.float32, bitcast=True)
            total += product * scale + row_sum[None, :] * (zero - 136 * scale)  # 128 and 8
        return tl.sum(total, 1)

    @triton.jit
    def linear_kernel(
        x,
        weight,
        scale_zero,
        bias,
        norm_weight,
        norm_bias,
        residual,
        out,
        N,
        eps,
        K: tl.constexpr,
        K_PADDED: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        INNER: tl.constexpr,
        GROUP: tl.constexpr,
        NORM: tl.constexpr,
        NORM_BIAS: tl.constexpr,
        BIAS: tl.constexpr,
        ACTIVATION: tl.constexpr,
        RESIDUAL: tl.constexpr,
    ):
        """BLOCK_N outputs of one row: out = residual + activation(weight norm(x) + bias).

        INNER 0: weight (N, K), or (2 N, K) for swiglu; otherwise 4-bit words, INNER tiles of 16
        inputs together.
        """
        row = tl.program_id(0)  # the fastest: rows share the weights in the cache
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = n < N
        x += row * K
        rows_all = 2 * N if ACTIVATION == 3 else N
        if INNER:
            tiles = load_words(weight, n, mask, K, BLOCK_K, INNER)
            ups = load_words(weight, n + N, mask, K, BLOCK_K, INNER) if ACTIVATION == 3 else tiles
        else:
            tiles = load_tiles(weight, n, mask, K, BLOCK_K)
            ups = load_tiles(weight, n + N, mask, K, BLOCK_K) if ACTIVATION == 3 else tiles
        mean, rstd = 0.0, 0.0
        if NORM:
            mean, rstd = norm_statistics(x, eps, NORM, K, K_PADDED)
        if INNER:
            y = times_words(
                tiles,
                x,
                scale_zero,
                n,
                mask,
                rows_all,
                mean,
                rstd,
                norm_weight,
                norm_bias,
                NORM,
                NORM_BIAS,
                BLOCK_N,
                BLOCK_K,
                INNER,
                GROUP,
            )
        else:
            y = times_tiles(
                tiles, x, mean, rstd, norm_weight, norm_bias, NORM, NORM_BIAS, BLOCK_N, BLOCK_K
            )
        if BIAS:
            y += tl.load(bias + n, mask, 0.0).to(tl.float32)
        if ACTIVATION == 1:
            y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
        elif ACTIVATION == 2:
            y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
        elif ACTIVATION == 3:
            if INNER:
                up = times_words(
                    ups,
                    x,
                    scale_zero,
                    n + N,
                    mask,
                    rows_all,
                    mean,
                    rstd,
                    norm_weight,
                    norm_bias,
                    NORM,
                    NORM_BIAS,
                    BLOCK_N,
                    BLOCK_K,
                    INNER,
                    GROUP,
                )
            else:
                up = times_tiles(
                    ups, x, mean, rstd, norm_weight, norm_bias, NORM, NORM_BIAS, BLOCK_N, BLOCK_K
                )
            if BIAS:
                up += tl.load(bias + N + n, mask, 0.0).to(tl.float32)
            y = y * tl.sigmoid(y) * up
        if RESIDUAL:
            y += tl.load(residual + row * N + n, mask, 0.0).to(tl.float32)
        tl.store(out + row * N + n, y.to(out.dtype.element_ty), mask)


def linear(x, layer, norm=None, activation=None, residual=None):
    """residual + activation(layer(norm(x))) of x (B, K), B <= MOST_SEQUENCES: (B, N), x's dtype."""
    K, N = layer.in_features, layer.out_features // (2 if activation == "swiglu" else 1)
    wide = 32 if N >= 16384 and isinstance(layer, Int4Linear) else 16
    block_n = max(1, min(wide, 2 * TILE // K if wide == 32 else TILE // K))
    block_n = 2 ** (block_n.bit_length() - 1)
    while block_n > 4 and triton.cdiv(N, block_n) < LEAST_PROGRAMS:
        block_n //= 2
    block_k = min(1024, K & -K)  # the largest power of two in K
    weight, scale_zero, inner, group = x, x, 0, 0
    if isinstance(layer, Int4Linear):
        weight, inner, group = layer.packed, inner_tiles(K), layer.group_size
        scale_zero = layer.scale_zero.view(torch.int32)
    else:
        weight = layer.weight
    norm_bias = None if norm is None else norm.bias
    out = torch.empty(len(x), N, dtype=x.dtype, device=x.device)
    linear_kernel[(len(x), triton.cdiv(N, block_n))](
        x,
        weight,
        scale_zero,
        x if layer.bias is None else layer.bias,
        x if norm is None else norm.weight,
        x if norm_bias is None else norm_bias,
        x if residual is None else residual,
        out,
        N,
        0.0 if norm is None else norm.eps,
        K,
        triton.next_power_of_2(K),
        block_n,
        block_k,
        inner,
        group,
        NORMS[norm and norm.kind],
        norm_bias is not None,
        layer.bias is not None,
        ACTIVATIONS[activation],
        residual is not None,
        num_warps=WARPS,
    )
    return out


def decode_one_token(model, idx, cache):
    """As model.decode_one_token: one more token a row, idx (B, 1) -> logits (B, V)."""
    config = model.config
    positions = cache.begin(1).positions  # (B, 1)
    x = model.embed(idx, positions).squeeze(1)  # (B, C)
    B, D, turn = len(x), config.head_dim, None
    if config.position == "rope":
        turn = rope_table(D, positions.flatten(), config.rope_theta, config.rope_scaling)
    for block, layer in zip(model.transformer.h, cache.layers):
        qkv = linear(x, block.attn.c_attn, block.ln_1)
        q, k, v = (part.view(B, -1, 1, D) for part in qkv.split(block.attn.row_blocks, -1))
        y = cache.kernel(q, k, v, layer.keys, layer.values, cache, turn)
        x = linear(y.view(B, -1), block.attn.c_proj, residual=x)
        h = linear(x, block.mlp.c_fc, block.ln_2, activation=config.mlp)
        x = linear(h, block.mlp.c_proj, residual=x)
    cache.advance(1)
    return linear(x, model.lm_head, model.transformer.ln_f)


def supports(model, cache):
    """Whether decode_one_token here can take the model's steps."""
    blocks = model.transformer.h
    linears = [
        m
        for block in blocks
        for m in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    ]
    dtype = model.transformer.wte.weight.dtype
    return (
        cache.kernel is not None
        and not model.config.qk_norm  # a norm between projection and rope is none of its kernels
        and cache.batch_size <= MOST_SEQUENCES
        and dtype in (torch.bfloat16, torch.float16)
        and not torch.is_autocast_enabled(model.transformer.wte.weight.device.type)
        and all(supports_linear(m, dtype) for m in [*linears, model.lm_head])
        and all(p.dtype == dtype for p in model.parameters())
    )


def supports_linear(layer, dtype):
    """Does linear_kernel multiply numbers of `dtype` by this layer?"""
    if layer.in_features % 64 or layer.in_features > 16384:
        return False
    if isinstance(layer, Int4Linear):
        return (
            layer.layout == "cuda"
            and layer.tail is None
            and dtype == torch.bfloat16
            and word_order_known(layer.packed.device)
        )
    return type(layer) is nn.Linear and layer.weight.dtype == dtype


def inner_tiles(in_features):
    """Tiles of 16 inputs that int4._to_cuda stores together."""
    return next(n for n in (8, 4, 2) if in_features % (16 * n) == 0)


@functools.cache
def word_order_known(device):
    """Does aten._convert_weight_to_int4pack order words as `words_of` and times_words say?"""
    for K in (64, 384):
        codes = torch.randint(16, (16, K), generator=torch.Generator().manual_seed(0))
        packed = ((codes[:, 0::2] << 4) | codes[:, 1::2]).to(device, torch.uint8)
        try:
            words = aten._convert_weight_to_int4pack(packed, inner_tiles(K))
        except RuntimeError:
            return False
        if not torch.equal(words.flatten().cpu(), words_of(codes, inner_tiles(K))):
            return False
    return True


def words_of(codes, inner):
    """Codes (N, K) int64 -> the words of 8 codes, int32, in the kernel's order, flat."""
    N, K = codes.shape
    # k = 16 (inner outer + 2 word + high) + 8 eight + 2 lane + one
    parts = codes.view(N // 8, 8, K // (16 * inner), inner // 2, 2, 2, 4, 2)
    high, eight, one = torch.meshgrid(*[torch.arange(2)] * 3, indexing="ij")
    shifts = 8 * high + 4 * eight + 16 * one
    parts = parts.permute(0, 2, 1, 6, 3, 4, 5, 7)  # (tile, outer, n, lane, word, high, eight, one)
    words = (parts << shifts).sum((-1, -2, -3)).flatten()
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
