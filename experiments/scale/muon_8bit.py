"""Muon with its momentum in 8 bits, as published (arXiv 2509.23106): torch's Muon around it.

The momentum of every linear weight is kept as int8 codes with one float32 scale, the largest
magnitude over 127, for each block of 2,048 consecutive elements, rounded to nearest ("linear"
quantisation). It is float32 during the update alone.
"""

import torch

BLOCK = 2048  # elements that share a scale


class Muon8bit(torch.optim.Muon):
    """torch.optim.Muon, options and all; state: `codes` (int8) and `scales` (float32)."""

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        for p, state in self.state.items():
            state["momentum_buffer"] = dequantized(state.pop("codes"), state.pop("scales"), p)
        loss = super().step(closure)
        for state in self.state.values():
            state["codes"], state["scales"] = quantized(state.pop("momentum_buffer"))
        return loss


def quantized(momentum):
    """A tensor of N elements -> codes (N,) int8 and scales (ceil(N / BLOCK),) float32."""
    flat = momentum.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1) / 127
    codes = (blocks / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8)
    return codes.flatten()[: len(flat)], scales


def dequantized(codes, scales, like):
    """What `quantized` was given, about: a float32 tensor of the shape of `like`."""
    expanded = scales.repeat_interleave(BLOCK)[: len(codes)]
    return (codes * expanded).view(like.shape)
