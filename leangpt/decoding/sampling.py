"""Choosing a token from logits, on the device, with the generator's own random numbers."""

from dataclasses import dataclass

import torch

from leangpt.system.errors import UserError

SHORTLIST = 1024  # most likely tokens sorted first for top_p
COLD = 1e-5  # a lower temperature is greedy: logits divided by it need not be finite


@dataclass
class Sampler:
    """The rule that picks a token. Raises UserError for a setting out of range."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int | None = None  # only the k most likely
    top_p: float | None = None  # only the fewest that hold this probability
    generator: torch.Generator | None = None  # of random numbers, on the logits' device
    vocab_size: int | None = None  # ids from there on are never chosen (padding of the table)

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be positive, or None for all tokens, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], not {self.top_p}")

    def __call__(self, logits):
        """logits (B, V) -> as sample_token."""
        logits = logits[:, : self.vocab_size]
        return sample_token(logits, self.temperature, self.top_k, self.top_p, self.generator)


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B, V) -> a token for each row, (B,) int64, and its evidence, (B,).

    The evidence is a finite number where the row's logits are, and NaN or infinite where one of
    them is NaN or +infinite; the token is then some id below V. One uniform number a row goes
    through the inverse of the cumulative distribution: 50,000 exponentials for an argmax would cost
    a CPU more than a 4-bit layer does.
    """
    if temperature < COLD:
        evidence, chosen = logits.max(-1)
        return chosen, evidence
    order = None
    if top_k is not None and top_k < logits.size(-1):  # so the rest costs k, not V
        logits, order = logits.topk(top_k)
    p = (logits.float() / temperature).softmax(-1)
    if top_p is not None and top_p < 1:  # tokens before which less than top_p is spent
        if order is None:
            p, order = most_likely(p, top_p)
        p = p * (p.cumsum(-1) - p < top_p)
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:]
    u = torch.rand(total.shape, generator=generator, device=total.device) * total
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))  # never past the end
    chosen = torch.searchsorted(cumulative, u, right=True)
    chosen.clamp_(max=p.size(-1) - 1)  # where NaN is past any end
    return (chosen if order is None else order.gather(-1, chosen)).squeeze(-1), total.squeeze(-1)


def most_likely(p, top_p):
    """p (B, V) sorted downwards, and the tokens; on the CPU no more of them than needed."""
    if p.device.type == "cpu" and p.size(-1) > SHORTLIST:
        likely, order = p.topk(SHORTLIST)
        if bool((likely.sum(-1) >= top_p).all()):
            return likely, order
    return p.sort(dim=-1, descending=True)
