"""GPT-2's MLP on a Hopper GPU: gelu and its gradient inside the matrix products around it.

    h = x W_fcᵀ,  a = gelu(h),  y = a W_projᵀ                    forward; x and h are kept
    da = dy W_proj,  dh = da gelu'(h),  a = gelu(h) once more    backward
    dW_proj = dyᵀ a,  dW_fc = dhᵀ x,  dx = dh W_fc

Unfused, gelu reads and writes (rows, 4C) arrays in kernels of their own, at the speed of memory.
Here one kernel makes h and a, another da, dh and a; da itself never reaches memory. The products
without gelu stay cuBLAS's. Each kernel is persistent: a program per processor walks over tiles of
the output, operands come through TMA, the next tile's loads are under way while this one's
epilogue runs, and the epilogue takes the accumulator in parts, to stay within the registers.

Phi, the normal distribution function in gelu(h) = h Phi(h), is one exp2 of a polynomial here,
2e-4 exact relative to Phi(-z) for z < 5: a tenth of what rounding to bfloat16 costs.
"""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    AVAILABLE = INTERPRETED or torch.cuda.is_available()
except ImportError:
    AVAILABLE = False

# tile of the output, step along the inner dimension, parts of the epilogue: the fastest on an H100
FORWARD = dict(BM=256, BN=128, BK=64, PARTS=4, num_stages=4, num_warps=8)
BACKWARD = dict(BM=128, BN=256, BK=64, PARTS=2, num_stages=3, num_warps=8)
PER_PROCESSOR = dict(forward=1, backward=1)  # programs on each of the GPU's processors
LEAST_ROWS = 4096  # fewer do not fill the GPU, and cuBLAS chooses better


def fits(x, dtype, c_fc, c_proj):
    """Do rows x (..., C), taken as dtype, and the two linear layers suit the kernels?"""
    if not AVAILABLE or dtype != torch.bfloat16 or not x.is_cuda:
        return False
    linear = type(c_fc) is type(c_proj) is torch.nn.Linear  # not packed weights
    if not linear or c_fc.bias is not None or c_proj.bias is not None:
        return False
    if torch.cuda.get_device_properties(x.device).major != 9:
        return False
    inner, C = c_fc.weight.shape
    rows = x.numel() // C
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
    def backward_scalar(da, h):
        a, slope = gelu_and_slope(h, False)
        return a, da * slope

    @triton.jit
    def backward_scalar_tanh(da, h):
        a, slope = gelu_and_slope(h, True)
        return a, da * slope

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
    def forward_kernel(x, w, h, a, M, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
                       BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
                       TANH: tl.constexpr, PROGRAMS: tl.constexpr):
        """h = x wᵀ and a = gelu(h): descriptors of x (M, K), w (N, K), h and a (M, N)."""
        across: tl.constexpr = N // BN
        width: tl.constexpr = BN // PARTS
        for tile in tl.range(tl.program_id(0), M // BM * across, PROGRAMS, flatten=True):
            row, column = tile // across * BM, tile % across * BN
            total = tl.zeros((BM, BN), tl.float32)
            for k in range(K // BK):
                total = tl.dot(x.load([row, k * BK]), w.load([column, k * BK]).T, total)
            parts = parts_of(total, PARTS)
            for i in tl.static_range(PARTS):
                h.store([row, column + i * width], parts[i].to(h.dtype))
                out, _ = gelu_and_slope(parts[i], TANH)
                a.store([row, column + i * width], out.to(h.dtype))

    @triton.jit
    def backward_kernel(dy, w, h, dh, a, M, N: tl.constexpr, K: tl.constexpr,
                        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                        PARTS: tl.constexpr, TANH: tl.constexpr, RECOMPUTE: tl.constexpr,
                        COMPILED: tl.constexpr, PROGRAMS: tl.constexpr):
        """dh = (dy w) gelu'(h), a = gelu(h): dy (M, K), w (K, N), h, dh, a (M, N)."""
        across: tl.constexpr = N // BN
        width: tl.constexpr = BN // PARTS
        for tile in tl.range(tl.program_id(0), M // BM * across, PROGRAMS, flatten=True):
            row, column = tile // across * BM, tile % across * BN
            total = tl.zeros((BM, BN), tl.float32)
            for k in range(K // BK):
                total = tl.dot(dy.load([row, k * BK]), w.load([k * BK, column]), total)
            parts = parts_of(total, PARTS)
            for i in tl.static_range(PARTS):
                before = h.load([row, column + i * width]).to(tl.float32)
                if COMPILED:  # keeps da and h in one layout: gelu is computed once
                    if TANH:
                        out, grad = tl.map_elementwise(backward_scalar_tanh, parts[i], before)
                    else:
                        out, grad = tl.map_elementwise(backward_scalar, parts[i], before)
                else:
                    out, slope = gelu_and_slope(before, TANH)
                    grad = parts[i] * slope
                if RECOMPUTE:
                    a.store([row, column + i * width], out.to(h.dtype))
                dh.store([row, column + i * width], grad.to(h.dtype))


def up_and_gelu(x, w_fc, tanh, settings=FORWARD):
    """x (M, C), w_fc (N, C), both bfloat16 -> h = x w_fcᵀ and gelu(h), (M, N) bfloat16."""
    (M, K), N = x.shape, len(w_fc)
    h, a = x.new_empty(M, N), x.new_empty(M, N)
    BM, BN, BK = (settings[name] for name in ("BM", "BN", "BK"))
    part = [BM, BN // settings["PARTS"]]
    count = programs(x) * PER_PROCESSOR["forward"]
    forward_kernel[(count,)](
        TensorDescriptor.from_tensor(x, [BM, BK]), TensorDescriptor.from_tensor(w_fc, [BN, BK]),
        TensorDescriptor.from_tensor(h, part), TensorDescriptor.from_tensor(a, part),
        M, N, K, TANH=tanh, PROGRAMS=count, **settings)
    return h, a


def down_and_gelu_backward(dy, w_proj, h, tanh, settings=BACKWARD, a=None):
    """dy (M, C), w_proj (C, N), h (M, N), bfloat16 -> dh = (dy w_proj) gelu'(h) and gelu(h)."""
    (M, K), N = dy.shape, h.size(1)
    dh, recompute = torch.empty_like(h), a is None
    a = torch.empty_like(h) if recompute else a
    BM, BN, BK = (settings[name] for name in ("BM", "BN", "BK"))
    part = [BM, BN // settings["PARTS"]]
    count = programs(h) * PER_PROCESSOR["backward"]
    backward_kernel[(count,)](
        TensorDescriptor.from_tensor(dy, [BM, BK]), TensorDescriptor.from_tensor(w_proj, [BK, BN]),
        TensorDescriptor.from_tensor(h, part), TensorDescriptor.from_tensor(dh, part),
        TensorDescriptor.from_tensor(a, part), M, N, K, TANH=tanh, RECOMPUTE=recompute,
        COMPILED=not INTERPRETED, PROGRAMS=count, **settings)
    return dh, a


def programs(x):
    """One for each of the GPU's processors."""
    if INTERPRETED:
        return 3
    return torch.cuda.get_device_properties(x.device).multi_processor_count


@torch.library.custom_op("leangpt::gelu_mlp", mutates_args=())
def mlp_op(x: torch.Tensor, w_fc: torch.Tensor, w_proj: torch.Tensor,
           tanh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    h, a = up_and_gelu(x.contiguous(), w_fc.contiguous(), tanh)
    return a @ w_proj.t(), h


@mlp_op.register_fake
def _(x, w_fc, w_proj, tanh):
    return x.new_empty(len(x), len(w_proj)), x.new_empty(len(x), len(w_fc))


@torch.library.custom_op("leangpt::gelu_mlp_backward", mutates_args=())
def mlp_backward_op(dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, w_fc: torch.Tensor,
                    w_proj: torch.Tensor, tanh: bool,
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dy = dy.contiguous()
    dh, a = down_and_gelu_backward(dy, w_proj.contiguous(), h, tanh)
    dw_proj = dy.t() @ a
    del a
    return dh @ w_fc, dh.t() @ x, dw_proj


@mlp_backward_op.register_fake
def _(dy, x, h, w_fc, w_proj, tanh):
    return torch.empty_like(x), torch.empty_like(w_fc), torch.empty_like(w_proj)


def _save(ctx, inputs, output):
    x, w_fc, w_proj, ctx.tanh = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], w_fc, w_proj)


def _backward(ctx, dy, _):
    x, h, w_fc, w_proj = ctx.saved_tensors
    return *mlp_backward_op(dy, x, h, w_fc, w_proj, ctx.tanh), None


mlp_op.register_autograd(_backward, setup_context=_save)


def gelu_mlp(x, w_fc, w_proj, tanh=False):
    """gelu(x w_fcᵀ) w_projᵀ for bfloat16 x (..., C), w_fc (N, C), w_proj (C, N), where `fits`.

    tanh: torch's approximate="tanh". Keeps x and x w_fcᵀ for the backward pass.
    """
    y, _ = mlp_op(x.flatten(0, -2), w_fc, w_proj, tanh)
    return y.view(*x.shape[:-1], len(w_proj))
