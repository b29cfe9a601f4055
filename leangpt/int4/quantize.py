"""Packing the linear layers of a module in 4 bits, each rounded to the inputs it will get."""

from contextlib import contextmanager, suppress

import torch
from torch import nn

from leangpt.int4.rounding import fit_groups, round_to_inputs
from leangpt.layers.int4_layouts import pack
from leangpt.layers.int4_linear import Int4Linear, check_group_size
from leangpt.system import huge_pages
from leangpt.system.errors import UserError


def quantize_(module, group_size=32, calibrate=None):
    """Replace every nn.Linear in `module` by an Int4Linear, in place; returns module.

    calibrate: a function that runs the module once on typical input (for a GPT:
    int4/calibration.py). Each linear is rounded when its turn comes, to fit the inputs it gets from
    the layers rounded before it. With None, or where the run never calls a linear, its weights
    alone decide. Tied embeddings are not touched: the head gets its own 4-bit copy and look-up
    stays exact. Raises UserError, with nothing touched, where group_size is not 32, 64, 128 or does
    not divide a layer's inputs.
    """
    linears = linears_of(module, group_size)
    left = set(linears)
    waiting = {name: RoundedWhenCalled(linears[name], group_size, name, left) for name in linears}
    if calibrate:
        with swapped(module, waiting), torch.no_grad(), suppress(AllRounded):
            calibrate()
    for name, linear in linears.items():
        swap_(module, {name: waiting.pop(name).rounded or round_linear(linear, group_size)})
    gather_(module)
    return module


def round_linear(linear, group_size=32, inputs=None):
    """An Int4Linear for an nn.Linear; inputs (..., in_features): typical inputs, if known."""
    N, K = linear.weight.shape
    layer = Int4Linear(K, N, group_size=group_size, device=linear.weight.device)
    with torch.no_grad():
        if inputs is None:
            codes, scale, zero = fit_groups(linear.weight, group_size)
        else:
            codes, scale, zero = round_to_inputs(linear.weight, group_size, inputs)
        layer.store(pack(codes), torch.stack([scale.T, zero.T], dim=-1).contiguous())
    layer.bias = linear.bias
    return layer


class AllRounded(Exception):
    """Ends a calibration: a large head's logits, which nobody asked for, are never computed."""


class RoundedWhenCalled(nn.Linear):
    """In a linear's place during a calibration: the first inputs it is called with round it, and it
    answers as its rounded self. Raises AllRounded once no name is `left`, this one's taken out."""

    def __init__(self, linear, group_size, name, left):
        nn.Module.__init__(self)  # not nn.Linear's: it would make another weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.group_size, self.rounded = group_size, None
        self.name, self.left = name, left

    def forward(self, x):
        if self.rounded is None:
            self.rounded = round_linear(self, self.group_size, x)
            self.left.remove(self.name)
        if not self.left:
            raise AllRounded
        return self.rounded(x)


def linears_of(module, group_size):
    """{name: nn.Linear} of a module. Raises UserError where the group size does not suit one."""
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        check_group_size(group_size, linear.in_features, name)
    return linears


def empty_int4_(module, group_size=32):
    """As quantize_, with layers of zeros where the linears were, for weights that never were
    floats."""
    for name, linear in linears_of(module, group_size).items():
        bias, device = linear.bias is not None, linear.weight.device
        layer = Int4Linear(linear.in_features, linear.out_features, bias, group_size, device)
        swap_(module, {name: layer})
    return module


def swap_(module, layers):
    """Put layers, {name: layer}, where those of the same names in `module` stand."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer)


@contextmanager
def swapped(module, layers):
    """`with swapped(module, layers):` the same for a while; the old ones come back at its end."""
    before = {name: module.get_submodule(name) for name in layers}
    swap_(module, layers)
    try:
        yield
    finally:
        swap_(module, before)


def int4_layers(module):
    """{name: Int4Linear} of a module."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Int4Linear)}


def gather_(module):
    """Put the 4-bit weights in module side by side, on huge pages where they can be; in place."""
    huge_pages.gather_(list(int4_layers(module).values()), ("packed", "scale_zero"))


def storage_bits(module):
    """Bits per weight in all Int4Linear layers of module, counted from their tensors."""
    layers = int4_layers(module).values()
    if not layers:
        raise UserError("storage_bits: no int4 layers here; call quantize_ first")
    stored = sum(b.numel() * b.element_size() for layer in layers for b in layer.buffers())
    return 8 * stored / sum(layer.in_features * layer.out_features for layer in layers)
