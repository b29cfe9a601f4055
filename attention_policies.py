"""Attention policies: where keys and values live while a block runs, and what decoding keeps.

  policy     keys and values of       while a block runs            a token costs a cache layer
  cache      all H heads              kept for all T rows           2 C numbers
  grouped    G < H heads              kept for all T rows           2 C G/H
  recompute  H heads, or G            k_chunk rows at a time        C: its input, for K and V anew

Every policy has the same parameters and gives the same numbers, so weights trained under one run
under another. (`grouped` is grouped-query attention, arXiv 2305.13245: its key/value heads are
fewer, so it needs weights trained for that.)

To add a policy, add one entry to POLICIES: a KV source (leangpt/attention/kv_source.py) and a
cache layer (leangpt/kv_cache/cache.py), its own or another's. Nothing else compares names.

A block runs plain, K and V of all rows at once, or tile by tile (leangpt/attention/block_tiles.py)
where `tile_sizes` has tiles for it: always under `recompute`, but for short sequences in training,
and otherwise where q_chunk is given or checkpoint_layers asks for them. The three functions below
are the three ways through a block: all rows, a prompt that also fills a cache, one new token.
"""

from dataclasses import dataclass, replace

import torch

from leangpt.attention.block_tiles import fill_cache, run_tiles
from leangpt.attention.kv_source import RecomputedRows, StoredRows, attend, row_positions
from leangpt.attention.tile_sizes import sizes_in_pieces, tile_sizes
from leangpt.kv_cache.cache import KeysValues, StoredInputs
from leangpt.system.errors import UserError


@dataclass(frozen=True)
class Policy:
    """What a run says with --attention_policy: how a block gets its keys and values, in training
    (by tiles) and in decoding (from a cache).
    """

    name: str  # as in --attention_policy
    description: str
    source: type  # of keys and values while a block runs by tiles
    cache_layer: type  # what decoding remembers of the past
    grouped: bool = False  # fewer key/value heads than heads: a quarter unless n_kv_head is given
    leaner: str | None = None  # the policy to turn to where this one's memory does not suffice

    @property
    def recomputes(self) -> bool:
        """Are K and V made again from x whenever they are wanted, not kept?"""
        return self.source.recomputes


POLICIES = {
    policy.name: policy
    for policy in (
        Policy(
            "cache",
            "K and V of all rows kept while a block runs",
            source=StoredRows,
            cache_layer=KeysValues,
            leaner="recompute",
        ),
        Policy(
            "grouped",
            "the same with n_kv_head < n_head key/value heads",
            source=StoredRows,
            cache_layer=KeysValues,
            grouped=True,
            leaner="recompute",
        ),
        Policy(
            "recompute",
            "K and V recomputed from x, k_chunk rows at a time",
            source=RecomputedRows,
            cache_layer=StoredInputs,
        ),
    )
}


def apply_rules(config) -> None:
    """Fill in and check what a policy asks of a GPTConfig. Raises UserError."""
    policy = config.policy
    if policy.grouped and config.n_kv_head is None:
        config.n_kv_head = max(1, config.n_head // 4)
    if config.n_head % config.kv_heads:
        raise UserError(f"n_kv_head={config.n_kv_head} does not divide n_head={config.n_head}")
    if policy.grouped and config.kv_heads == config.n_head > 1:
        raise UserError(
            f"attention_policy={policy.name!r} needs n_kv_head smaller than n_head="
            f"{config.n_head}; use 'cache' for one key/value head per head"
        )
    if config.k_chunk is not None and not policy.recomputes and not config.q_chunk:
        raise UserError(
            f"k_chunk={config.k_chunk} does nothing under attention_policy={policy.name!r} "
            "without q_chunk; set q_chunk too"
        )
    first = config.checkpoint_first
    if first is not None and not 0 < first <= config.n_layer:
        raise UserError(f"checkpoint_first={first} must be 1 to n_layer={config.n_layer}")
    for name in ("checkpoint_first", "offload"):
        if getattr(config, name) and not config.checkpoint_layers:
            raise UserError(
                f"{name}={getattr(config, name)} is about checkpointed layers: set "
                "checkpoint_layers=True too"
            )


def layer_configs(config) -> list:
    """What each layer runs by: the GPTConfig itself, or copies where checkpoint_first is set.

    The last layers are those that keep their activations: they are the first to be done with them,
    before any other is computed again.
    """
    first = config.checkpoint_first
    if first is None:
        return [config] * config.n_layer
    early = replace(config, checkpoint_first=None)
    late = replace(early, checkpoint_layers=False, offload=False)
    return [early] * first + [late] * (config.n_layer - first)


def run_block(block, x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """A block over all rows of x (B, T, C) -> (B, T, C), with or without gradients.

    inplace: where there are tiles and no gradient is recorded, write over x, so that a stack of
    layers needs one residual stream in all. Raises UserError for attention dropout under tiles.
    """
    sizes = tile_sizes(block.config, x.size(1), x.device.type)
    if block.pieces is not None:
        sizes = sizes_in_pieces(block.config, x.size(1), x.device.type)
    if sizes is None:
        return (block.compiled or block).plain(x)
    return run_tiles(block, x, sizes, inplace)


def prefill_block(block, x, step, layer):
    """run_block over a prompt x (B, T, C), overwritten where tiled, filling a cache's layer too.

    step: of the cache (leangpt/kv_cache/steps.py), T tokens long. No gradients.
    """
    sizes = tile_sizes(block.config, x.size(1), x.device.type)
    if sizes is not None:
        fill_cache(block, x, sizes, step, layer)
        return run_tiles(block, x, sizes, inplace=True)
    x_norm = block.ln_1(x)
    q, k, v = block.attn.project(x_norm, row_positions(0, x.size(1), x.device))
    layer.store(step, x_norm, k, v)
    y = attend(q, k, v)
    del q, k, v, x_norm  # before the MLP runs
    return block.finish(x, y)


def decode_block(block, x, step, rotation, layer):
    """One new token a sequence: x (B, 1, C); the past in a cache's layer -> (B, 1, C).

    rotation: attn.rotation of the step's positions, all layers' alike.
    """
    x_norm = block.ln_1(x)
    new = block.attn.project(x_norm, rotation, layer.parts)
    y = layer.attend_new(step, x_norm, block.attn, *new)
    return block.finish(x, y)
