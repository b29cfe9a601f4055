"""4-bit layers as a GGUF file holds them: its codes, not rounded a second time.

llama.cpp's blocks of 32 weights of a row, the code q of weight j in the low half of byte j and that
of weight j + 16 in its high half:

    Q4_0   w = d (q - 8)     float16 d, 16 bytes
    Q4_1   w = d q + m       float16 d, float16 m, 16 bytes

Ours are w = (q - 8) scale + zero, groups of 32: scale = d, and zero = 0 or m + 8 d, rounded to
bfloat16: a few hundredths of a step between two codes, where rounding to codes took up to half one.
"""

import numpy as np
import torch

from leangpt.int4.quantize import gather_, swap_
from leangpt.layers.int4_layouts import pack
from leangpt.layers.int4_linear import Int4Linear
from leangpt.weights.find import open_weights
from leangpt.weights.gguf import GGUFWeights
from leangpt.weights.load import halves_apart

STORED_GROUP = 32  # weights that share a scale, in these formats
FLOATS = {"Q4_0": 1, "Q4_1": 2}  # float16 numbers at the head of a block


def take_stored_(model, path):
    """Put a GGUF file's own 4-bit codes in the place of linear layers of `model` -> their names.

    model: a GPT that was filled from `path` (a file, or a folder as weights.find has it: none is
    replaced where that holds no GGUF file); other layers stay as they are. A layer of ours that
    several tensors fill is taken where all of them are in 4 bits.
    """
    weights = open_weights(path)
    if not isinstance(weights, GGUFWeights):
        return []
    layers, tied = {}, model.config.tie_embeddings
    for piece in weights.pieces(model.config):
        name, _, kind = piece.ours.rpartition(".")
        if kind == "weight":
            name = "lm_head" if tied and name == "transformer.wte" else name
            layers.setdefault(name, []).append(piece)
    taken = {}
    for name, pieces in layers.items():
        linear = model.get_submodule(name)
        kinds = {weights.kind(piece.theirs) for piece in pieces}
        if isinstance(linear, torch.nn.Linear) and kinds <= FLOATS.keys():
            taken[name] = stored_layer(linear, pieces, weights)
    swap_(model, taken)
    gather_(model)
    return list(taken)


def stored_layer(linear, pieces, weights):
    """An Int4Linear in the place of `linear`, with the codes of its pieces one below the other."""
    codes, scale_zero = [], []
    for piece in sorted(pieces, key=lambda piece: piece.rows or (0,)):
        parts = read_blocks(weights.stored(piece.theirs), weights.kind(piece.theirs))
        if piece.paired_heads:
            parts = [halves_apart(part.flatten(1), piece.paired_heads) for part in parts]
        codes.append(parts[0])
        scale_zero.append(parts[1].unflatten(1, (-1, 2)) if parts[1].ndim == 2 else parts[1])
    N, K = linear.weight.shape
    layer = Int4Linear(K, N, group_size=STORED_GROUP)
    scale_zero = torch.cat(scale_zero).transpose(0, 1).contiguous()
    layer.store(pack(torch.cat(codes)), scale_zero)
    layer.bias = linear.bias
    return layer.to(linear.weight.device)


def read_blocks(data, kind):
    """(codes (N, K) uint8 0..15, scale and zero (N, K/32, 2) bfloat16) of a tensor's bytes.

    data: (N, bytes of a row) uint8, as gguf maps it; kind: a name of FLOATS.
    """
    head = 2 * FLOATS[kind]
    blocks = np.ascontiguousarray(data).reshape(len(data), -1, head + STORED_GROUP // 2)
    numbers = torch.from_numpy(blocks[..., :head].copy().view(np.float16)).float()
    both = torch.from_numpy(blocks[..., head:].copy())  # (N, K/32, 16)
    codes = torch.cat([both & 15, both >> 4], dim=-1).flatten(1)
    scale = numbers[..., 0]
    zero = numbers[..., 1] + 8 * scale if kind == "Q4_1" else torch.zeros_like(scale)
    return codes, torch.stack([scale, zero], dim=-1).bfloat16()
