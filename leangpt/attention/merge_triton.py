"""The merge of two partial attentions in one pass over memory, on the GPU.

Plain PyTorch widens the tile, then lerps: 18 bytes a number. This kernel reads the running sum
(float32) and the tile (bfloat16), writes the sum, and updates the logsumexp beside: 10 bytes.
"""

from leangpt.system.triton import tl, triton


@triton.jit
def _merge_kernel(
    out,
    lse,
    tile,
    tile_lse,
    H,
    T,
    so_b,
    so_h,
    so_t,
    sl_b,
    sl_h,
    sl_t,
    st_b,
    st_h,
    st_t,
    sm_b,
    sm_h,
    sm_t,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    d = tl.arange(0, DP)
    inside = t < T
    lse += b * sl_b + h * sl_h + t * sl_t
    old = tl.load(lse, mask=inside, other=0.0)
    new = tl.load(tile_lse + b * sm_b + h * sm_h + t * sm_t, mask=inside, other=0.0)
    weight = tl.sigmoid(new - old)
    high = tl.maximum(old, new)
    tl.debug_barrier()  # a row's lse is loaded by several threads: all of them before one stores
    tl.store(lse, high + tl.log(tl.exp(old - high) + tl.exp(new - high)), mask=inside)
    block = inside[:, None] & (d < D)[None, :]
    out += b * so_b + h * so_h + t[:, None] * so_t + d[None, :]
    tile += b * st_b + h * st_h + t[:, None] * st_t + d[None, :]
    a = tl.load(out, mask=block, other=0.0)
    x = tl.load(tile, mask=block, other=0.0).to(tl.float32)
    tl.store(out, a + weight[:, None] * (x - a), mask=block)


def merge_(out, lse, tile_out, tile_lse):
    """tile_kernels.merge_ for out (B, H, t, D) and lse (B, H, t) float32 on CUDA.

    tile_out like out in any float dtype, its last dimension dense; tile_lse like lse.
    """
    B, H, T, D = out.shape
    block_t = 64
    _merge_kernel[(triton.cdiv(T, block_t), B * H)](
        out,
        lse,
        tile_out,
        tile_lse,
        H,
        T,
        *out.stride()[:3],
        *lse.stride(),
        *tile_out.stride()[:3],
        *tile_lse.stride(),
        D,
        triton.next_power_of_2(D),
        block_t,
    )
