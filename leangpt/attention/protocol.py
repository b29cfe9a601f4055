"""What a block must offer to be run by row tiles (block_tiles.py). Anything that does may be.

The requirement behind it: rows meet in attention only. What precedes attention (`project`) and
what follows it (`finish`) treats each row alone, so both may be called for any rows at any time,
again in backward too. model.Block is one such block, tile_layers.py makes others of Hugging Face's.

Shapes: B sequences, t of their T rows, C the residual stream's width, H query heads, G key/value
heads, D head dim.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch


class BlockShape(Protocol):
    """The numbers tiles go by; model.GPTConfig has them."""

    n_embd: int  # C
    n_head: int  # H
    kv_heads: int  # G, a divisor of H
    head_dim: int  # D; H D need not be C
    source: Any  # a class of kv_source.py: StoredRows or RecomputedRows
    q_chunk: int | None  # rows per tile; None: chosen
    k_chunk: int | None  # key/value rows per tile; None: chosen
    checkpoint_layers: bool  # save a block's input for backward, and nothing else


class RowParts(NamedTuple):
    """The same functions as the block's methods of these names, compiled."""

    project: Callable
    finish: Callable
    plain: Callable


class TileableBlock(Protocol):
    """What a transformer block must offer so that block_tiles can run it by tiles of rows. It may
    have `pieces` as well: parallel/pieces.Pieces, where other processes hold other rows."""

    config: BlockShape
    attention_dropout: float  # probability in force now; more than 0 is refused
    residual_dropout: float  # likewise; replayed in backward from a seed
    offload: Any  # offload.HostStack where a block's input waits on the host, or None
    compiled: RowParts | None  # called instead of the methods, if any

    def project(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        parts: str = "qkv",
        heads: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Rows of the residual stream -> their queries, keys and values, ready for attention.

        x (B, t, C); positions (t,) int64: which rows of the sequence they are, for rotary angles.
        parts: "qkv", "q" or "kv". heads: key/value heads [first, stop) and their queries alone.
        Returns a tuple of what `parts` names: q (B, H, t, D), k and v (B, G, t, D).
        """

    def finish(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x (B, t, C) and attention's output y (B, H, t, D) -> the block's output (B, t, C)."""

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The whole block over whole sequences, untiled: x (B, T, C) -> (B, T, C)."""

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """All tensors that the functions above use and that may want gradients."""
