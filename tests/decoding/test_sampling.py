"""Tokens drawn as their probabilities say, and what becomes of logits that are no numbers."""

import pytest
import torch

from leangpt.decoding.sampling import COLD, Sampler, sample_token
from leangpt.system.errors import UserError


def test_sample_token_draws_from_the_distribution():
    logits = torch.tensor([1.0, -1.0, 0.5, 3.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    n = 20000
    for options, kept in (
        ({}, 5),
        ({"top_k": 3}, 3),
        ({"top_p": 0.7}, 2),
        ({"top_p": 1e-6}, 1),
        ({"top_k": 4, "top_p": 0.9}, 3),
    ):
        drawn, _ = sample_token(logits.expand(n, 5), 1.3, generator=generator, **options)
        p = (logits / 1.3).softmax(-1)
        keep = p.topk(kept).indices
        want = torch.zeros(5).index_copy(0, keep, p[keep] / p[keep].sum())
        got = drawn.bincount(minlength=5) / n
        assert (got - want).abs().max() < 4 * (0.25 / n) ** 0.5, options
        assert (got[want == 0] == 0).all()


def test_sample_token_never_takes_an_impossible_token():
    logits = torch.full((4096, 50), -torch.inf)
    logits[:, 7] = 0.0
    assert (sample_token(logits, generator=torch.Generator().manual_seed(0))[0] == 7).all()
    wide = torch.randn(64, 3000, generator=torch.Generator().manual_seed(1)) * 4
    best = wide.argmax(-1)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0}, {"temperature": 1e-4}):
        assert torch.equal(sample_token(wide, **options)[0], best)


@pytest.mark.slow
def test_top_p_beyond_the_shortlist_is_exact():
    flat = torch.zeros(2, 3000)
    drawn, _ = sample_token(
        flat.expand(2, -1).repeat(4000, 1), top_p=0.9, generator=torch.Generator().manual_seed(0)
    )
    assert 2500 < len(drawn.unique()) <= 2701  # of 3000


@pytest.mark.parametrize("temperature", [COLD / 2, 1e-40, 5e-324])
def test_towards_zero_a_temperature_is_greedy(temperature):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 1e4
    tokens, evidence = sample_token(logits, temperature, top_k=9, top_p=0.9)
    assert torch.equal(tokens, logits.argmax(-1)) and evidence.isfinite().all()


@pytest.mark.parametrize(
    "options", [dict(temperature=0), {}, dict(top_k=3), dict(top_p=0.9), dict(top_k=5, top_p=0.5)]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_of_no_numbers_are_told_apart(bad, options):
    """Their token is an id all the same: the step that follows looks it up."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    logits[2, 1234] = bad
    logits[1, 7] = -torch.inf  # a token that cannot be: no fault
    tokens, evidence = sample_token(logits, **options)
    assert evidence.isfinite().tolist() == [True, True, False, True]
    assert ((tokens >= 0) & (tokens < 3000)).all()
    nothing, evidence = sample_token(torch.full((1, 9), -torch.inf), **options)
    assert not evidence.isfinite().any() and 0 <= int(nothing) < 9


def test_a_sampler_hides_padded_ids_and_checks_its_settings():
    logits = torch.zeros(200, 8)
    logits[:, 6] = 50.0
    assert Sampler(vocab_size=5)(logits)[0].max() < 5
    for options, words in (
        (dict(temperature=-1.0), "temperature must be 0"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_k=0), "top_k must be positive"),
        (dict(top_p=0.0), "top_p must lie"),
    ):
        with pytest.raises(UserError, match=words):
            Sampler(**options)
