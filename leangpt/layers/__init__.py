"""Layers that keep less than torch's: the chunked loss, rotary positions, 4-bit linear layers."""

from leangpt.layers.loss import chunked_cross_entropy

__all__ = ["chunked_cross_entropy"]
