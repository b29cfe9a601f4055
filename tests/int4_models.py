"""Small models and layers for the tests of 4-bit weights and of kernels."""

import torch
from torch import nn

from model import GPT, GPTConfig


def make_model(**options):
    torch.manual_seed(0)
    settings = dict(block_size=32, vocab_size=65, n_layer=2, n_head=4, n_embd=64, bias=True)
    return GPT(GPTConfig(**(settings | options))).eval()


def linear(out_features, in_features, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
