"""A conversation's answers are those of a fresh prompt each time, and cost what is new."""

import itertools

import pytest
import torch

from leangpt.decoding import conversation
from leangpt.decoding.conversation import Conversation
from leangpt.decoding.generate import generate
from leangpt.decoding.sampling import Sampler
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

KINDS = [
    dict(position=position, attention_policy=policy)
    for position in ("learned", "rope", "none")
    for policy in ("cache", "grouped", "recompute")
]


def make(**settings):
    torch.manual_seed(0)
    shape = dict(block_size=96, vocab_size=50, n_layer=2, n_head=4, n_embd=64)
    model = GPT(GPTConfig(**shape | settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model


def fresh(model, ids, count, **options):
    out = generate(model, torch.tensor([ids]), count, temperature=0, **options)
    return out[0, len(ids) :].tolist()


def tokens(count, seed):
    return torch.randint(50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_turn_after_turn(settings, monkeypatch):
    monkeypatch.setattr(conversation, "AT_ONCE", 4)
    model = make(**settings)
    talk = Conversation(model, Sampler(0))
    text, total = tokens(9, 1), 0
    for turn in range(3):
        answer = list(talk.answer(text, 6))
        assert answer == fresh(model, text, 6)
        total += 9 if turn == 0 else 8  # the last token of an answer was never read
        assert talk.read_tokens == total
        text = text + answer + tokens(7, turn + 2)


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_a_text_that_turns_out_otherwise(kv_bits):
    """An answer that is rendered in another way, a turn forgotten, the same text again."""
    model = make(position="rope")
    talk = Conversation(model, Sampler(0), kv_bits=kv_bits)
    first = tokens(30, 1)
    for text in (first, first[:20] + tokens(9, 2), first[5:], first[5:], first[:1]):
        assert list(talk.answer(text, 5)) == fresh(model, text, 5, kv_bits=kv_bits)


def test_weights_that_were_moved_are_read_where_they_are():
    """Another memory under the same parameters, as a trip through another device leaves; then
    another type. The old memory is kept: a crash would tell no more than other tokens do."""
    model, other = make(position="rope"), make(position="rope")
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    talk = Conversation(model, Sampler(0))
    text = tokens(9, 1)
    list(talk.answer(text, 5))
    kept = [p.data for p in model.parameters()]
    for p, new in zip(model.parameters(), other.parameters()):
        p.data = new.data.clone()
    assert list(talk.answer(text, 5)) == fresh(other, text, 5)
    model.to(torch.bfloat16), other.to(torch.bfloat16)
    assert list(talk.answer(text, 5)) == fresh(other, text, 5)
    del kept


def test_an_answer_may_be_left_at_any_token():
    model = make(position="rope")
    talk = Conversation(model, Sampler(0))
    text = tokens(9, 1)
    for taken in (1, 3):
        text = text + list(itertools.islice(talk.answer(text, 8), taken)) + tokens(4, taken)
    assert list(talk.answer(text, 5)) == fresh(model, text, 5)
    assert talk.read_tokens < 9 + 2 * 6 + 3


def test_stop_tokens_end_an_answer_and_are_not_part_of_it():
    model = make()
    text = tokens(9, 1)
    plain = fresh(model, text, 8)
    stop = plain[5]
    talk = Conversation(model, Sampler(0), [stop])
    answer = list(talk.answer(text, 8))
    assert answer == plain[: plain.index(stop)]
    text = text + answer + [stop] + tokens(3, 2)
    assert list(talk.answer(text, 1))[:1] == [t for t in fresh(model, text, 1) if t != stop]


def test_a_cache_that_grows_begins_anew(monkeypatch):
    monkeypatch.setattr(conversation, "SMALLEST", 16)
    model = make(position="rope")
    talk = Conversation(model, Sampler(0))
    text = tokens(9, 1)
    for turn in range(4):
        answer = list(talk.answer(text, 6))
        assert answer == fresh(model, text, 6)
        text = text + answer + tokens(7, turn)
    assert talk.loop.cache.max_length == 64


def test_the_context_is_the_end():
    talk = Conversation(make(), Sampler(0))
    assert len(list(talk.answer(tokens(90, 1), 50))) == 6
    for ids in ([], tokens(96, 1)):
        with pytest.raises(UserError, match="cannot go on"):
            list(talk.answer(ids, 5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_captured_steps():
    model = make(position="rope").cuda()
    talk = Conversation(model, Sampler(0))
    text = tokens(9, 1)
    for turn in range(3):
        answer = list(talk.answer(text, 6))
        assert answer == generate(model, torch.tensor([text]).cuda(), 6, 0)[0, len(text) :].tolist()
        text = text + answer + tokens(7, turn)
