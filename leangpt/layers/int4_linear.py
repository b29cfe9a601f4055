"""Linear layers whose weights are 4-bit integers, two in a byte, unpacked while they run.

    w ~ (code - 8) * scale + zero       a bfloat16 scale and zero for each group of inputs

so a weight costs 4 + 32 / group_size bits: 5.0, 4.5 or 4.25 at groups of 32, 64 or 128. How codes,
scales and zeros are chosen: int4/rounding.py. Saving and loading whole models: int4/files.py.

A layer holds one copy of its weights, in the order that the device's kernel wants:

    vnni   few rows: cpu_kernels.int4_rows, on processors that have it
    cpu    few rows: aten._weight_int4pack_mm_for_cpu, bfloat16 activations
    cuda   few rows: aten._weight_int4pack_mm, bfloat16 activations
    plain  everywhere else, and many rows everywhere: unpack, then an ordinary matrix product

All give the same numbers but for the two aten kernels' bfloat16 activations. State dicts always
hold the plain order (columns 2j and 2j + 1 in the high and low half of a byte), so they travel.
Not for training: the packed weights have no gradient.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from leangpt.int4.rounding import fit_groups, round_to_inputs
from leangpt.layers import linear_cpu
from leangpt.system import huge_pages
from leangpt.system.errors import UserError

GROUP_SIZES = (32, 64, 128)
FEW_ROWS = {"vnni": 16, "cpu": 8, "cuda": 16, "plain": 0}  # up to here kernels beat unpack + matmul
CHUNK = 2**18  # weights converted at a time: keeps the conversion's int32 codes small
aten = torch.ops.aten


class Int4Linear(nn.Module):
    """y = x W^T + b with W (out_features, in_features) in 4 bits; x (..., in_features).

    packed, scale_zero (in/group, M, 2): the first M rows, in the order of `layout`;
    tail, tail_scale_zero: the up to 15 last rows that aten's kernels do not take, in plain order.
    """

    def __init__(self, in_features, out_features, bias=False, group_size=32, device="cpu"):
        super().__init__()
        check_group_size(group_size, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.layout = group_size, "plain"
        for name in ("packed", "scale_zero", "tail", "tail_scale_zero"):
            self.register_buffer(name, None)
        codes = torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scale_zero = torch.zeros(
            in_features // group_size, out_features, 2, dtype=torch.bfloat16, device=device
        )
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self.store(codes, scale_zero)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear, group_size=32, inputs=None):
        """Round an nn.Linear; inputs (..., in_features): typical inputs, if known."""
        N, K = linear.weight.shape
        device = linear.weight.device
        layer = cls(K, N, group_size=group_size, device=device)
        if inputs is None:
            codes, scale, zero = fit_groups(linear.weight, group_size)
        else:
            codes, scale, zero = round_to_inputs(linear.weight, group_size, inputs)
        layer.store(pack(codes), torch.stack([scale.T, zero.T], dim=-1).contiguous())
        layer.bias = linear.bias
        for name in ("row_blocks", "head_dim"):  # how c_attn's rows are divided
            if hasattr(linear, name):
                setattr(layer, name, getattr(linear, name))
        return layer

    def forward(self, x):
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        if x.numel() > FEW_ROWS[self.layout] * self.in_features:
            return self._dense(x, 0, self.out_features)
        rows = x.reshape(-1, self.in_features)
        if self.layout == "vnni":
            return self._vnni(rows).view(*x.shape[:-1], self.out_features)
        if x.dtype != torch.bfloat16:
            rows = rows.to(torch.bfloat16)
        if self.layout == "cpu":
            y = aten._weight_int4pack_mm_for_cpu(
                rows, self.packed, self.group_size, self.scale_zero
            )
        else:
            y = aten._weight_int4pack_mm(rows, self.packed, self.group_size, self.scale_zero)
        if self.tail is not None:
            tail = dequantize(unpack(self.tail), self.tail_scale_zero, torch.bfloat16)
            y = torch.cat([y, F.linear(rows, tail)], dim=-1)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _vnni(self, rows):
        """forward for few rows (n, in_features) in the `vnni` order: as few operators as can be."""
        dtype, bias = rows.dtype, self.bias
        if dtype not in linear_cpu.HALF:
            rows = rows.float()
        if bias is not None and bias.dtype != rows.dtype:
            bias = bias.to(rows.dtype)
        y = linear_cpu.int4_rows(rows, self.packed, self.scale_zero, bias, self.group_size)
        return y if y.dtype == dtype else y.to(dtype)

    def forward_rows(self, x, start, stop):
        """Outputs start:stop alone: x (..., in_features) -> (..., stop - start)."""
        if x.numel() > FEW_ROWS[self.layout] * self.in_features:
            return self._dense(x, start, stop)
        return self(x)[..., start:stop]

    def _dense(self, x, start, stop):
        bias = None if self.bias is None else self.bias[start:stop].to(x.dtype)
        return F.linear(x, self.dequantize(x.dtype, start, stop), bias)

    def dequantize(self, dtype=torch.float32, start=0, stop=None):
        """The weights that the layer stands for: rows start:stop, (stop - start, in_features)."""
        stop = self.out_features if stop is None else stop
        codes = self.codes(start, stop)
        scale_zero = self.scale_zero
        if self.tail is not None:
            scale_zero = torch.cat([scale_zero, self.tail_scale_zero], dim=1)
        return dequantize(codes, scale_zero[:, start:stop], dtype)

    def codes(self, start=0, stop=None):
        """Codes 0..15 of rows start:stop, (stop - start, in_features) uint8."""
        stop = self.out_features if stop is None else stop
        main = self.scale_zero.size(1)
        parts = []
        if start < main:
            read = {"plain": _from_plain, "vnni": _from_vnni, "cpu": _from_cpu, "cuda": _from_cuda}[
                self.layout
            ]
            parts.append(read(self.packed, self.in_features, start, min(stop, main)))
        if stop > main:
            parts.append(unpack(self.tail[max(start - main, 0) : stop - main]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def store(self, packed, scale_zero):
        """Take plain-order bytes (N, K/2) and scale_zero (K/group, N, 2); keep the kernel's."""
        self.layout = layout_for(packed.device, self.out_features)
        main = self.out_features
        if self.layout in ("cpu", "cuda"):
            main -= main % 16
        self.tail = self.tail_scale_zero = None
        if main < self.out_features:
            self.tail = packed[main:].clone()
            self.tail_scale_zero = scale_zero[:, main:].clone()
        write = {"plain": _to_plain, "vnni": _to_vnni, "cpu": _to_cpu, "cuda": _to_cuda}[
            self.layout
        ]
        self.packed = write(packed[:main])
        self.scale_zero = scale_zero[:, :main].contiguous()

    def plain_order(self):
        """The stored weights in plain order: bytes (N, K/2), scale_zero (K/group, N, 2)."""
        if self.layout == "plain":
            return self.packed, self.scale_zero
        step = chunk_rows(self.in_features)
        packed = [
            pack(self.codes(i, min(i + step, self.out_features)))
            for i in range(0, self.out_features, step)
        ]
        scale_zero = [self.scale_zero]
        if self.tail is not None:
            scale_zero.append(self.tail_scale_zero)
        return torch.cat(packed), torch.cat(scale_zero, dim=1)

    def saved_shapes(self):
        """Shapes of this layer's entries in a state dict, by name."""
        K, N, group = self.in_features, self.out_features, self.group_size
        shapes = {"packed": (N, K // 2), "scale_zero": (K // group, N, 2)}
        return shapes if self.bias is None else shapes | {"bias": (N,)}

    def _apply(self, fn, recurse=True):
        """.to(), .cuda(), .bfloat16() ...: scales stay bfloat16; a new device, a new order."""
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.packed.device)).device
        if device != self.packed.device:
            packed, scale_zero = self.plain_order()
            self.store(packed.to(device), scale_zero.to(device))
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "packed"], destination[prefix + "scale_zero"] = self.plain_order()
        if self.bias is not None:
            bias = self.bias if keep_vars else self.bias.detach()
            destination[prefix + "bias"] = bias

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        device, wanted = self.packed.device, self.saved_shapes()
        found = {name: state.get(prefix + name) for name in wanted}
        good = True
        for name, shape in wanted.items():
            if found[name] is None:
                missing.append(prefix + name)
                good = False
            elif tuple(found[name].shape) != shape:
                errors.append(f"{prefix}{name} has shape {tuple(found[name].shape)}, not {shape}")
                good = False
        if strict:
            unexpected.extend(
                name
                for name in state
                if name.startswith(prefix) and name[len(prefix) :] not in wanted
            )
        if good:
            self.store(found["packed"].to(device), found["scale_zero"].to(device))
            if self.bias is not None:
                with torch.no_grad():
                    self.bias.copy_(found["bias"])

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group_size={self.group_size}, {self.layout}"
        )


def check_group_size(group_size, in_features, name="a layer"):
    if group_size not in GROUP_SIZES:
        raise UserError(f"int4 group_size={group_size}: use 32, 64 or 128")
    if in_features % group_size:
        raise UserError(
            f"int4 group_size={group_size} does not divide the {in_features} inputs of {name}"
        )


class AllRounded(Exception):
    """Ends a calibration: a large head's logits, which nobody asked for, are never computed."""


def quantize_(module, group_size=32, calibrate=None):
    """Replace every nn.Linear in `module` by an Int4Linear, in place; returns module.

    calibrate: a function that runs the module once on typical input; by default what the module's
    own method `calibration()` returns, if it has one (a GPT writes itself a text). Each linear is
    rounded when its turn comes, to fit the inputs it gets from the layers rounded before it. With
    calibrate=False, or where the run never calls a linear, its weights alone decide.
    Tied embeddings are not touched: the head gets its own 4-bit copy and look-up stays exact.
    A GPT's head is evened out first, GPT.even_head, which changes its last norm.
    Raises UserError where group_size is not 32, 64, 128 or does not divide a layer's inputs.
    """
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        check_group_size(group_size, linear.in_features, name)
    if "lm_head" in linears and hasattr(module, "even_head"):
        module.even_head()
    rounded = {}
    if calibrate is None and hasattr(module, "calibration"):
        calibrate = module.calibration()
    if calibrate:

        def observe(name, x):
            if name not in rounded:
                rounded[name] = Int4Linear.from_linear(linears[name], group_size, x)
            if len(rounded) == len(linears):
                raise AllRounded
            return rounded[name](x)

        for name, linear in linears.items():
            linear.forward = functools.partial(observe, name)
        try:
            with torch.no_grad():
                calibrate()
        except AllRounded:
            pass
        finally:
            for linear in linears.values():
                del linear.forward
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        layer = rounded.pop(name, None) or Int4Linear.from_linear(linear, group_size)
        setattr(module.get_submodule(parent), child, layer)
    gather_(module)
    return module


def gather_(module):
    """Put the 4-bit weights in module side by side, on huge pages where they can be; in place."""
    layers = [m for m in module.modules() if isinstance(m, Int4Linear)]
    huge_pages.gather_(layers, ("packed", "scale_zero"))


def replace_linears(module, group_size=32, device="cpu"):
    """As quantize_, with empty layers: for loading packed weights that never were floats."""
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear):
            check_group_size(group_size, linear.in_features, name)
            layer = Int4Linear(
                linear.in_features, linear.out_features, linear.bias is not None, group_size, device
            )
            for attribute in ("row_blocks", "head_dim"):
                if hasattr(linear, attribute):
                    setattr(layer, attribute, getattr(linear, attribute))
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer)
    return module


def storage_bits(module):
    """Bits a weight in all Int4Linear layers of module, counted from their tensors."""
    layers = [m for m in module.modules() if isinstance(m, Int4Linear)]
    if not layers:
        raise UserError("storage_bits: no int4 layers here; call quantize_ first")
    stored = sum(b.numel() * b.element_size() for layer in layers for b in layer.buffers())
    return 8 * stored / sum(layer.in_features * layer.out_features for layer in layers)


def pack(codes):
    """Codes (N, K) uint8 0..15 -> plain order (N, K/2)."""
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def unpack(packed):
    """Plain order (N, K/2) -> codes (N, K) uint8."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)


def dequantize(codes, scale_zero, dtype):
    """codes (N, K) uint8, scale_zero (K/group, N, 2) -> weights (N, K)."""
    scale, zero = scale_zero.transpose(0, 1).to(dtype).unsqueeze(-1).unbind(2)  # (N, K/group, 1)
    grouped = codes.unflatten(1, (scale.size(1), -1)).to(dtype).sub_(8)
    return torch.addcmul(zero, grouped, scale).flatten(1)


# The device kernels' own orders. PyTorch's two are undocumented: found out, not assumed.


def layout_for(device, out_features):
    """Which order a layer of so many rows has on this device: vnni, cpu, cuda or plain."""
    if out_features < 16:
        return "plain"
    if device.type == "cpu" and linear_cpu.available():
        return "vnni"
    if device.type == "cpu" and _cpu_order() is not None:
        return "cpu"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "cuda"
    return "plain"


def chunk_rows(in_features):
    """Rows converted at a time: whole blocks of every order."""
    return max(1, CHUNK // in_features // 64) * 64


def _to_plain(packed):
    return packed.contiguous()


def _from_plain(packed, in_features, start, stop):
    return unpack(packed[start:stop])


def _to_vnni(packed):
    result = torch.empty_like(packed)
    step = chunk_rows(2 * packed.size(1))
    for i in range(0, len(packed), step):
        result[i : i + step] = linear_cpu.pack_int4(packed[i : i + step])
    return result


def _from_vnni(packed, in_features, start, stop):
    first, last = start // 16 * 16, min(-(-stop // 16) * 16, len(packed))
    return linear_cpu.unpack_int4(packed[first:last])[start - first : stop - first]


@functools.cache
def _cpu_order():
    """(rows a block, halves?) of the CPU kernel's order, or None where there is no kernel.

    A block of rows is stored input after input; one input's bytes hold rows i and i + block/2
    (halves) or rows 2i and 2i + 1. Wide registers have 64-row blocks, narrower ones 32.
    """
    codes = torch.randint(16, (112, 64), generator=torch.Generator().manual_seed(0))
    try:
        packed = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    for order in ((64, True), (32, True), (32, False)):
        if torch.equal(_cpu_codes(packed, order), codes.to(torch.uint8)):
            return order
    return None


def _to_cpu(packed):
    result = torch.empty_like(packed)
    step = chunk_rows(2 * packed.size(1))
    for i in range(0, len(packed), step):
        codes = unpack(packed[i : i + step]).int()
        result[i : i + step] = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return result


def _from_cpu(packed, in_features, start, stop):
    first, last = start // 64 * 64, min(-(-stop // 64) * 64, len(packed))
    return _cpu_codes(packed[first:last], _cpu_order())[start - first : stop - first]


def _cpu_codes(packed, order):
    """Whole blocks of the CPU's order (N, K/2) -> codes (N, K)."""
    block, halves = order
    N, K = packed.size(0), 2 * packed.size(1)
    whole = N // block * block
    parts = []
    for rows, step, split in ((packed[:whole], block, halves), (packed[whole:], N - whole, False)):
        if len(rows):
            rows = rows.reshape(-1, K, step // 2)  # (blocks, K, block/2)
            low, high = rows & 15, rows >> 4
            both = torch.cat([low, high], -1) if split else torch.stack([low, high], -1).flatten(2)
            parts.append(both.transpose(1, 2).reshape(-1, K))
    return torch.cat(parts)


def _to_cuda(packed):
    """(N, K/2) bytes -> the int32 tile order of the tensor-core kernel, the same size."""
    K = 2 * packed.size(1)
    inner_tiles = next(n for n in (8, 4, 2) if K % (16 * n) == 0)
    return aten._convert_weight_to_int4pack(packed.contiguous(), inner_tiles)


def _from_cuda(packed, in_features, start, stop):
    """Codes by multiplying the identity: with scale 1 and zero 8 the products are the codes."""
    first, last = start // 8, -(-stop // 8)  # tiles of 8 rows
    tiles = packed[first:last].contiguous()
    rows = 8 * len(tiles)
    eye = torch.eye(in_features, dtype=torch.bfloat16, device=packed.device)
    ones = torch.ones(in_features // 32, rows, 2, dtype=torch.bfloat16, device=packed.device)
    ones[..., 1] = 8
    codes = aten._weight_int4pack_mm(eye, tiles, 32, ones).T.to(torch.uint8)
    return codes[start - 8 * first : stop - 8 * first]
