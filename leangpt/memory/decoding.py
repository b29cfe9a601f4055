"""The memory of decoding, and what fits: weights in some number of bits, a KV cache, a prompt.

A step of decoding reads every weight that multiplies and the rows of all tokens before it; tokens
a second are what the memory's bandwidth allows of that, no more.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from leangpt.kv_cache.cache import build_cache
from leangpt.memory.run import one_layer
from leangpt.memory.search import CONTEXT, Budget
from leangpt.memory.speed import Rates
from leangpt.memory.tiles import predict_forward_peak

KV_BITS = (None, 8, 4)
STEP = 256  # tokens: contexts are multiples of it


@dataclass(frozen=True)
class Decoding:
    """How a model decodes. config: a GPTConfig; block_size is the context."""

    config: object
    batch_size: int = 1  # texts at once
    itemsize: int = 2  # bytes of a weight and of an exact row's numbers
    int4: bool = False  # linear layers packed in 4 bits
    group_size: int = 32  # weights of a packed row that share a scale and a zero
    kv_bits: int | None = None
    device_type: str = "cuda"

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """(all weights, those that a step reads)."""
        return weight_bytes(self)

    @property
    def row_bytes(self) -> int:
        """Of one token of one text, in all layers."""
        dtype = torch.float32 if self.itemsize == 4 else torch.bfloat16
        one = replace(self.config, n_layer=1)
        cache = build_cache(one, 1, 16, dtype=dtype, kv_bits=self.kv_bits)
        return cache.bytes_per_token * self.config.n_layer

    def parts(self, context: int | None = None) -> dict[str, int]:
        """Bytes by part for texts of `context` tokens (None: block_size), all of them a prompt's in
        the worst case."""
        context = context or self.config.block_size
        config = replace(self.config, block_size=context)
        parts = {
            "weights": self.weight_bytes[0],
            "cache": self.batch_size * context * self.row_bytes,
            "prompt": predict_forward_peak(
                config, self.batch_size, context, self.itemsize, self.device_type
            ),
        }
        return parts | ({"context": CONTEXT} if self.device_type == "cuda" else {})

    @property
    def flags(self) -> dict:
        """sample.py's settings."""
        c = self.config
        flags = {"dtype": "float32" if self.itemsize == 4 else "bfloat16"}
        flags |= {"num_samples": self.batch_size, "attention_policy": c.attention_policy}
        if self.int4:
            flags["int4"] = True
        if self.kv_bits:
            flags["kv_bits"] = self.kv_bits
        return flags

    @property
    def gives_up(self) -> tuple[str, ...]:
        """What differs from exact weights and rows, in words."""
        lost = []
        if self.int4:
            lost.append("weights in 4 bits")
        if self.kv_bits:
            lost.append(f"the past in {self.kv_bits} bits")
        if self.config.policy.recomputes:
            lost.append("K and V computed again each step")
        return tuple(lost)


def weight_bytes(how: Decoding) -> tuple[int, int]:
    """(all weights, those that a step reads): an embedding alone is looked up, not read whole."""
    model, L = one_layer(how.config), how.config.n_layer
    every = read = 0
    for name, module in model.named_modules():
        count = L if ".h." in name else 1
        size = sum(p.numel() for p in module.parameters(recurse=False)) * how.itemsize
        if isinstance(module, nn.Linear) and how.int4:
            numbers = module.in_features * module.out_features
            size = numbers // 2 + numbers // how.group_size * 4
            size += 4 * module.out_features * (module.bias is not None)
        if isinstance(module, nn.Linear) and name == "lm_head" and how.config.tie_embeddings:
            read += size
            every += size if how.int4 else 0  # packed beside the table, else the table itself
            continue
        every += count * size
        read += count * size * (not isinstance(module, nn.Embedding))
    return every, read


def fits_decoding(how: Decoding, budget: Budget, context: int | None = None) -> bool:
    """Do its parts leave the reserve free?"""
    return sum(how.parts(context).values()) <= budget.usable(how.device_type)


def longest_context(how: Decoding, budget: Budget) -> int:
    """Tokens that each text may have, a multiple of STEP, or all of learned positions; 0: none."""
    most = how.config.block_size if how.config.position == "learned" else 1 << 27
    most = min(most, how.config.sliding_window or most)
    if fits_decoding(how, budget, most):
        return most
    low, high = 0, most // STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits_decoding(how, budget, middle * STEP):
            low = middle
        else:
            high = middle - 1
    return low * STEP


def tokens_per_second(how: Decoding, rates: Rates) -> float:
    """Of all texts together, at the end of the context: the bandwidth over what a step reads."""
    cache = how.batch_size * how.config.block_size * how.row_bytes
    return how.batch_size * rates.bandwidth / (how.weight_bytes[1] + cache)


def ways_to_decode(asked: Decoding, fixed=frozenset()) -> list[Decoding]:
    """As asked, and every other policy, and fewer bits of weights and rows."""
    found = []
    leaner = asked.config.policy.leaner
    policies = [asked.config.attention_policy] + [leaner] * (
        leaner is not None and "attention_policy" not in fixed
    )
    for policy in policies:
        config = replace(asked.config, attention_policy=policy)
        for int4 in (asked.int4,) if "int4" in fixed or asked.int4 else (False, True):
            for bits in (asked.kv_bits,) if "kv_bits" in fixed else KV_BITS:
                found.append(replace(asked, config=config, int4=int4, kv_bits=bits))
    return found
