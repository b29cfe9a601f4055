"""A linear layer whose weights are 4-bit integers, two in a byte, unpacked while it runs.

    w ~ (code - 8) * scale + zero       a bfloat16 scale and zero for each group of inputs

so a weight costs 4 + 32 / group_size bits: 5.0, 4.5 or 4.25 at groups of 32, 64 or 128. How codes,
scales and zeros are chosen: int4/quantize.py. Saving and loading whole models: int4/files.py.

A layer holds one copy of its weights, in the order that the device's kernel wants for few rows
(layers/int4_layouts.py); many rows are unpacked for an ordinary matrix product. State dicts always
hold the plain order, so they travel. Not for training: the packed weights have no gradient.
"""

import torch
from torch import nn
from torch.nn import functional as F

from leangpt.layers.int4_layouts import LAYOUTS, chunk_rows, dequantize, layout_for, pack, unpack
from leangpt.system.errors import UserError

GROUP_SIZES = (32, 64, 128)


class Int4Linear(nn.Module):
    """y = x W^T + b with W (out_features, in_features) in 4 bits; x (..., in_features).

    packed, scale_zero (in/group, M, 2): the first M rows, in the order of `layout`;
    tail, tail_scale_zero: the up to 15 last rows that aten's kernels do not take, in plain order.
    All zeros at first. Raises UserError for a group size that is none, or does not divide inputs.
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

    def forward(self, x):
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        layout = LAYOUTS[self.layout]
        if x.numel() > layout.few_rows * self.in_features:
            return self._dense(x, 0, self.out_features)
        y = layout.multiply(x.reshape(-1, self.in_features), self)
        return y.view(*x.shape[:-1], self.out_features)

    def forward_rows(self, x, start, stop):
        """Outputs start:stop alone: x (..., in_features) -> (..., stop - start)."""
        if x.numel() > LAYOUTS[self.layout].few_rows * self.in_features:
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
            read = LAYOUTS[self.layout].read
            parts.append(read(self.packed, self.in_features, start, min(stop, main)))
        if stop > main:
            parts.append(unpack(self.tail[max(start - main, 0) : stop - main]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def store(self, packed, scale_zero):
        """Take plain-order bytes (N, K/2) and scale_zero (K/group, N, 2); keep the kernel's."""
        self.layout = layout_for(packed.device, self.out_features)
        layout = LAYOUTS[self.layout]
        main = self.out_features - self.out_features % layout.whole
        self.tail = self.tail_scale_zero = None
        if main < self.out_features:
            self.tail = packed[main:].clone()
            self.tail_scale_zero = scale_zero[:, main:].clone()
        self.packed = layout.write(packed[:main])
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

    def saved_tensors(self):
        """(shape, dtype) of this layer's entries in a state dict, by name; any float: None."""
        K, N, group = self.in_features, self.out_features, self.group_size
        entries = {
            "packed": ((N, K // 2), torch.uint8),
            "scale_zero": ((K // group, N, 2), torch.bfloat16),
        }
        return entries if self.bias is None else entries | {"bias": ((N,), None)}

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
        """With assign=True the layer moves to where the tensors are, as others do."""
        wanted = self.saved_tensors()
        found = {name: state.get(prefix + name) for name in wanted}
        before = len(missing) + len(errors)
        for name, (shape, dtype) in wanted.items():
            tensor = found[name]
            if tensor is None:
                missing.append(prefix + name)
            elif tuple(tensor.shape) != shape:
                errors.append(f"{prefix}{name} has shape {tuple(tensor.shape)}, not {shape}")
            elif tensor.dtype != dtype and (dtype or not tensor.is_floating_point()):
                errors.append(f"{prefix}{name} is {tensor.dtype}, not {dtype or 'floating point'}")
        if strict:
            unexpected.extend(
                name
                for name in state
                if name.startswith(prefix) and name[len(prefix) :] not in wanted
            )
        if len(missing) + len(errors) > before:
            return
        assign = metadata.get("assign_to_params_buffers", False)
        device = found["packed"].device if assign else self.packed.device
        self.store(found["packed"].to(device), found["scale_zero"].to(device))
        if self.bias is not None and assign:
            self.bias = nn.Parameter(found["bias"], self.bias.requires_grad)
        elif self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(found["bias"])

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group_size={self.group_size}, {self.layout}"
        )


def check_group_size(group_size, in_features, name="a layer"):
    """Raise UserError for a group size that is none, or does not divide a layer's inputs."""
    if group_size not in GROUP_SIZES:
        raise UserError(f"int4 group_size={group_size}: use 32, 64 or 128")
    if in_features % group_size:
        raise UserError(
            f"int4 group_size={group_size} does not divide the {in_features} inputs of {name}"
        )
