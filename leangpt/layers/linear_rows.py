"""Some outputs of a linear layer alone, at the cost of those: x (..., in) -> (..., rows)."""

import torch
from torch import nn
from torch.nn import functional as F


def linear_rows(linear, x, start, stop):
    """Outputs [start, stop) of a linear layer; packed weights (Int4Linear) have their own way."""
    if stop - start == linear.out_features:
        return linear(x)
    if not isinstance(linear, nn.Linear):
        return linear.forward_rows(x, start, stop)
    bias = None if linear.bias is None else linear.bias[start:stop]
    return F.linear(x, linear.weight[start:stop], bias)


def linear_heads(linear, x, start, blocks, groups, heads):
    """Of each of the blocks of rows stacked from row `start` on, the rows of some groups of heads.

    blocks: rows of each block, a multiple of `groups`; heads: [first, stop) of the groups. One
    product of gathered weights: its backward makes one gradient of x, not one a block.
    """
    rows = []
    for block in blocks:
        size = block // groups  # rows of a group
        rows.append(start + torch.arange(heads[0] * size, heads[1] * size))
        start += block
    rows = torch.cat(rows).to(x.device)
    bias = None if linear.bias is None else linear.bias.index_select(0, rows)
    return F.linear(x, linear.weight.index_select(0, rows), bias)
