"""GPT-2's MLP on a Hopper GPU: gelu and its gradient inside the matrix products around it.

    h = x W_fcᵀ,  a = gelu(h),  s = gelu'(h),  y = a W_projᵀ    forward; x, a and s are kept
    dh = (dy W_proj) s,  dW_proj = dyᵀ a,  dW_fc = dhᵀ x,  dx = dh W_fc               backward

Unfused, gelu reads and writes (rows, 4C) arrays in kernels of their own, at the speed of memory.
Here one kernel makes a and s, another dh; h and dy W_proj never reach memory. The products
without gelu stay cuBLAS's. Each kernel is persistent: a program per processor walks over tiles of
the output, operands come through TMA, the next tile's loads are under way while this one's
epilogue runs, and the epilogue takes the accumulator in parts, to stay within the registers.

Phi, the normal distribution function in gelu(h) = h Phi(h), is one exp2 of a polynomial here,
2e-4 exact relative to Phi(-z) for z < 5: a tenth of what rounding to bfloat16 costs.
"""

import torch

from leangpt.system.triton import AVAILABLE, INTERPRETED, TensorDescriptor, tl, triton

# tile of the output, step along the inner dimension, parts of the epilogue: the fastest on an H100
FORWARD = dict(BM=256, BN=128, BK=64, PARTS=4, num_stages=4, num_warps=8)
BACKWARD = dict(BM=128, BN=256, BK=64, PARTS=2, num_stages=3, num_warps=8)
LEAST_ROWS = 4096  # fewer do not fill the GPU, and cuBLAS chooses better


def supports(x, dtype, c_fc, c_proj):
    """Do rows x (..., C), taken as dtype, and the two linear layers suit the kernels?"""
    if not AVAILABLE or dtype != torch.bfloat16 or not x.is_cuda:
        return False
    linear = type(c_fc) is type(c_proj) is torch.nn.Linear  # not packed weights
    if not linear or c_fc.bias is not None or c_proj.bias is not None:
        return False
    if torch.cuda.get_device_properties(x.device).major != 9:
        return False
    inner, C = c_fc.weight.shape
    return shapes_suit(x.numel() // C, inner, C)


def shapes_suit(rows, inner, C):
    """Are there enough rows, and does every size fall into the kernels' tiles?"""
    return rows >= LEAST_ROWS and rows % 256 == 0 and inner % 256 == 0 and C % 64 == 0


if AVAILABLE:

    @triton.jit
    def gelu_and_slope(h, TANH: tl.constexpr):
        """gelu(h) and gelu'(h), float32."""
        if TANH:  # h s, s = sigmoid(2 sqrt(2/pi) (h + 0.044715 h^3)), as exp2
            square = h * h
            s = 1.0 / (1.0 + tl.exp2(h * (-0.10294324 * square - 2.3022082)))
            return h * s, s + h * s * (1.0 - s) * (0.21406662 * square + 1.5957691)
        z = tl.abs(h)
        tail = lower_tail(z)
        # the slope is Phi(h) + h phi(h) = 1/2 + sign(h) (1/2 - Phi(-z) + z phi(z)), z = |h|
        odd = 0.5 - tail + z * tl.exp2(h * h * -0.72134752 - 1.32574806)
        sign = h.to(tl.int32, bitcast=True) & -2147483648
        odd = (odd.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        return tl.maximum(h, 0.0) - z * tail, 0.5 + odd

    @triton.jit
    def lower_tail(z):
        """Phi(-z), z >= 0: 2 to a polynomial fitted to log2 Phi(-z) on [0, 5]."""
        q = z * -2.77853913e-4 + 5.40522642e-3
        q = q * z - 4.68505568e-2
        q = q * z - 4.65770334e-1
        q = q * z - 1.14876972
        return tl.exp2(q * z - 1.0)

    @triton.jit
    def halves(x):
        """(M, N) -> two of (M, N / 2), left and right."""
        pairs = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
        return tl.split(tl.permute(pairs, (0, 2, 1)))

    @triton.jit
    def parts_of(x, PARTS: tl.constexpr):
        """(M, N) -> PARTS of (M, N / PARTS), left to right."""
        if PARTS == 1:
            return (x,)
        else:
            left, right = halves(x)
            return parts_of(left, PARTS // 2) + parts_of(right, PARTS // 2)

    @triton.jit
    def forward_kernel(
        x,
        w,
        a,
        slope,
        M,
        N: tl.constexpr,
        K: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        PARTS: tl.constexpr,
        TANH: tl.constexpr,
        PROGRAMS: tl.constexpr,
    ):
        """a = gelu(x wᵀ) and its slope: descriptors of x (M, K), w (N, K), a and slope (M, N)."""
        across: tl.constexpr = N // BN
        width: tl.constexpr = BN // PARTS
        for tile in tl.range(tl.program_id(0), M // BM * across, PROGRAMS, flatten=True):
            row, column = tile // across * BM, tile % across * BN
            total = tl.zeros((BM, BN), tl.float32)
            for k in range(K // BK):
                total = tl.dot(x.load([row, k * BK]), w.load([column, k * BK]).T, total)
            parts = parts_of(total, PARTS)
            for i in tl.static_range(PARTS):
                out, rise = gelu_and_slope(parts[i], TANH)
                a.store([row, column + i * width], out.to(a.dtype))
                slope.store([row, column + i * width], rise.to(a.dtype))

    @triton.jit
    def backward_kernel(
        dy,
        w,
        slope,
        dh,
        M,
        N: tl.constexpr,
        K: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        PARTS: tl.constexpr,
        PROGRAMS: tl.constexpr,
    ):
        """dh = (dy w) slope: descriptors of dy (M, K), w (K, N), slope and dh (M, N)."""
        across: tl.constexpr = N // BN
        width: tl.constexpr = BN // PARTS
        for tile in tl.range(tl.program_id(0), M // BM * across, PROGRAMS, flatten=True):
            row, column = tile // across * BM, tile % across * BN
            total = tl.zeros((BM, BN), tl.float32)
            for k in range(K // BK):
                total = tl.dot(dy.load([row, k * BK]), w.load([k * BK, column]), total)
            parts = parts_of(total, PARTS)
            for i in tl.static_range(PARTS):
                grad = parts[i] * slope.load([row, column + i * width]).to(tl.float32)
                dh.store([row, column + i * width], grad.to(dh.dtype))


def up_and_gelu(x, w_fc, tanh, settings=FORWARD):
    """x (M, C), w_fc (N, C), both bfloat16 -> gelu(x w_fcᵀ) and its slope, (M, N) bfloat16."""
    (M, K), N = x.shape, len(w_fc)
    a, slope = x.new_empty(M, N), x.new_empty(M, N)
    BM, BN, BK = (settings[name] for name in ("BM", "BN", "BK"))
    part = [BM, BN // settings["PARTS"]]
    forward_kernel[(programs(x),)](
        TensorDescriptor.from_tensor(x, [BM, BK]),
        TensorDescriptor.from_tensor(w_fc, [BN, BK]),
        TensorDescriptor.from_tensor(a, part),
        TensorDescriptor.from_tensor(slope, part),
        M,
        N,
        K,
        TANH=tanh,
        PROGRAMS=programs(x),
        **settings,
    )
    return a, slope


def down_and_gelu_backward(dy, w_proj, slope, settings=BACKWARD):
    """dy (M, C), w_proj (C, N), slope (M, N), bfloat16 -> dh = (dy w_proj) slope (M, N)."""
    (M, K), N = dy.shape, slope.size(1)
    dh = torch.empty_like(slope)
    BM, BN, BK = (settings[name] for name in ("BM", "BN", "BK"))
    part = [BM, BN // settings["PARTS"]]
    backward_kernel[(programs(dy),)](
        TensorDescriptor.from_tensor(dy, [BM, BK]),
        TensorDescriptor.from_tensor(w_proj, [BK, BN]),
        TensorDescriptor.from_tensor(slope, part),
        TensorDescriptor.from_tensor(dh, part),
        M,
        N,
        K,
        PROGRAMS=programs(dy),
        **settings,
    )
    return dh


def programs(x):
    """One for each of the GPU's processors."""
    if INTERPRETED:
        return 3
    return torch.cuda.get_device_properties(x.device).multi_processor_count


@torch.library.custom_op("leangpt::gelu_mlp", mutates_args=())
def mlp_op(
    x: torch.Tensor, w_fc: torch.Tensor, w_proj: torch.Tensor, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gelu_mlp as an operator, which torch.compile leaves whole -> y, a, slope (for backward)."""
    a, slope = up_and_gelu(x.contiguous(), w_fc.contiguous(), tanh)
    return a @ w_proj.t(), a, slope


@mlp_op.register_fake
def _(x, w_fc, w_proj, tanh):
    inner = x.new_empty(len(x), len(w_fc))
    return x.new_empty(len(x), len(w_proj)), inner, torch.empty_like(inner)


@torch.library.custom_op("leangpt::gelu_mlp_backward", mutates_args=())
def mlp_backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    slope: torch.Tensor,
    w_fc: torch.Tensor,
    w_proj: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, w_fc and w_proj."""
    dy = dy.contiguous()
    dh = down_and_gelu_backward(dy, w_proj.contiguous(), slope)
    return dh @ w_fc, dh.t() @ x, dy.t() @ a


@mlp_backward_op.register_fake
def _(dy, x, a, slope, w_fc, w_proj):
    return torch.empty_like(x), torch.empty_like(w_fc), torch.empty_like(w_proj)


def _save(ctx, inputs, output):
    x, w_fc, w_proj, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], output[2], w_fc, w_proj)


def _backward(ctx, dy, *_):
    return *mlp_backward_op(dy, *ctx.saved_tensors), None


mlp_op.register_autograd(_backward, setup_context=_save)


def gelu_mlp(x, w_fc, w_proj, tanh=False):
    """gelu(x w_fcᵀ) w_projᵀ for bfloat16 x (..., C), w_fc (N, C), w_proj (C, N), where `supports`.

    tanh: torch's approximate="tanh". Keeps x, gelu and its slope for the backward pass.
    """
    y, *_ = mlp_op(x.flatten(0, -2), w_fc, w_proj, tanh)
    return y.view(*x.shape[:-1], len(w_proj))


def fused_mlp(x, c_fc, c_proj, kind):
    """c_proj(gelu(c_fc(x))) of x (B, t, C) by these kernels, under autocast in its dtype.

    kind: "gelu" or "gelu_tanh". None where the kernels do not support it, or no gradient is wanted.
    """
    if kind not in ("gelu", "gelu_tanh") or not torch.is_grad_enabled():
        return None
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    if not supports(x, dtype, c_fc, c_proj):
        return None
    weights = c_fc.weight.to(dtype), c_proj.weight.to(dtype)
    return gelu_mlp(x.to(dtype), *weights, tanh=kind == "gelu_tanh")
