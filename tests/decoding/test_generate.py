"""Generation: the text is the one a plain loop over full forwards would write."""

import time

import pytest
import torch

from leangpt.decoding import steps
from leangpt.decoding.generate import generate
from leangpt.decoding.sampling import sample_token
from leangpt.decoding.steps import DecodeLoop
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

POLICIES = [("cache", None), ("grouped", 2), ("recompute", None)]


def make(policy="cache", n_kv_head=None, **options):
    torch.manual_seed(0)
    settings = dict(block_size=24, vocab_size=37, n_layer=2, n_head=4, n_embd=32, bias=True)
    model = GPT(GPTConfig(**(settings | options), attention_policy=policy, n_kv_head=n_kv_head))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def prompt(B=2, T=5, vocab=37):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def recompute_all(model, idx, count, choose):
    """nanoGPT's generate: a full forward over the cropped text for every token."""
    for _ in range(count):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat([idx, choose(logits[:, -1])[:, None]], dim=1)
    return idx


def greedy(logits):
    return logits.argmax(-1)


@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
def test_greedy_text_is_the_plain_loops_also_past_block_size(policy, n_kv_head):
    model = make(policy, n_kv_head)
    want = recompute_all(model, prompt(), 40, greedy)
    assert want.size(1) > model.config.block_size
    assert torch.equal(generate(model, prompt(), 40, temperature=0), want)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_relative_positions_up_to_block_size_and_beyond(position):
    model = make(position=position)
    got = generate(model, prompt(), 40, temperature=0)
    assert torch.equal(got[:, :24], recompute_all(model, prompt(), 19, greedy))
    assert got.shape == (2, 45)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 3])])
@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
def test_warming_up_leaves_no_trace(policy, n_kv_head, kv_bits, count, lengths, monkeypatch):
    model, generator, seconds, streamed = make(policy, n_kv_head), torch.Generator(), [], []

    def text(**options):
        generator.manual_seed(11)
        return generate(
            model, prompt(), count, generator=generator, kv_bits=kv_bits, lengths=lengths, **options
        )

    want, state = text(), generator.get_state()
    warm = text(warmed=seconds.append, stream=streamed.append)
    assert torch.equal(warm, want) and torch.equal(generator.get_state(), state)
    assert len(seconds) == 1 and len(streamed) == count
    monkeypatch.setattr(steps, "WARM_UP", 3)  # less than the whole prompt
    assert torch.equal(text(warmed=seconds.append), want)
    want = generate(model, prompt(), count, temperature=0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(generate(model, prompt(), count, 0, warmed=seconds.append), want)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_what_only_a_first_time_takes_is_over_before_the_writing(monkeypatch):
    """As with kernels that compile: here the first step takes a second."""
    original, calls = DecodeLoop.step, []

    def slow_at_first(self):
        if not calls:
            time.sleep(1.0)
        calls.append(time.perf_counter())
        original(self)

    monkeypatch.setattr(DecodeLoop, "step", slow_at_first)
    told = []

    def warmed(seconds):
        told.extend([seconds, time.perf_counter()])

    generate(make(), prompt(), 20, warmed=warmed)
    seconds, when = told
    assert seconds >= 1.0 and calls[0] < when < calls[1]


def test_sampled_text_is_the_plain_loops():
    model = make()
    options = dict(temperature=0.8, top_k=9, top_p=0.9)
    generator = torch.Generator().manual_seed(11)
    want = recompute_all(
        model, prompt(), 40, lambda x: sample_token(x, generator=generator, **options)[0]
    )
    got = generate(model, prompt(), 40, generator=generator.manual_seed(11), **options)
    assert torch.equal(got, want)
    other = generate(model, prompt(), 40, generator=generator.manual_seed(12), **options)
    assert not torch.equal(got, other)


def test_the_same_seed_gives_the_same_text_under_every_policy():
    cache, recompute = make("cache"), make("recompute")
    texts = [
        generate(m, prompt(), 60, generator=torch.Generator().manual_seed(5), slide=6)
        for m in (cache, recompute)
    ]
    assert torch.equal(*texts)


@torch.no_grad()
def test_slide_sees_the_cropped_text():
    """slide=8: after each crop to 17 tokens, up to 24 are seen."""
    model, idx, slide = make(), prompt(), 8
    got = generate(model, idx, 40, temperature=0, slide=slide)
    start = 0  # first token in sight
    for n in range(idx.size(1), 45):
        if n - start > 24:
            start = n - (24 + 1 - slide)
        logits, _ = model(got[:, start:n])
        assert torch.equal(logits[:, -1].argmax(-1), got[:, n])


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
def test_rows_of_unequal_length_are_written_as_if_alone(policy, n_kv_head, position):
    model = make(policy, n_kv_head, position=position)
    idx, lengths = prompt(3, 9), torch.tensor([4, 9, 1])
    got = generate(model, idx, 30, temperature=0, lengths=lengths)  # past block_size too
    assert got.shape == (3, 39)
    for b, n in enumerate(lengths):
        alone = generate(model, idx[b : b + 1, :n], 30, temperature=0)
        assert torch.equal(got[b, : n + 30], alone[0])
        assert not got[b, n + 30 :].any()


def test_stop_tokens_end_a_row_and_not_the_others():
    model = make()
    free = generate(model, prompt(), 30, temperature=0)
    stop = int(free[0, 9])
    got = generate(model, prompt(), 30, temperature=0, stop_tokens=[stop])
    for row, plain in zip(got, free):
        hits = (plain[5:] == stop).nonzero()
        end = 5 + int(hits[0]) + 1 if len(hits) else 35
        assert torch.equal(row[:end], plain[:end])
        assert (row[end:] == stop).all()
    streamed = []
    alone = generate(model, prompt()[:1], 30, 0, stop_tokens=[stop], stream=streamed.append)
    assert torch.equal(alone, got[:1])
    assert streamed[-1] == [stop] and len(streamed) < 30  # stopped early


@pytest.mark.parametrize("count", [1, 7])
def test_stream_gets_every_token_once(count):
    streamed = []
    got = generate(make(), prompt(), count, stream=streamed.append)
    assert torch.tensor(streamed).T.tolist() == got[:, 5:].tolist()


def test_quantised_cache_writes_nearly_the_same_logits():
    model = make(position="rope", block_size=64)
    exact = generate(model, prompt(8), 30, temperature=0)
    close = generate(model, prompt(8), 30, temperature=0, kv_bits=8)
    same = (exact == close).float().mean()
    assert same > 0.9 and torch.equal(exact[:, :16], close[:, :16])


def test_vocab_size_hides_padded_ids():
    model = make()
    got = generate(model, prompt(vocab=5), 30, vocab_size=5, temperature=5.0)
    assert got.max() < 5


def test_training_mode_comes_back_and_dropout_is_off():
    model = make(dropout=0.5).train()
    a, b = (generate(model, prompt(), 20, temperature=0) for _ in range(2))
    assert torch.equal(a, b) and model.training


def test_the_text_can_be_trained_on():
    model = make()
    text = generate(model, prompt(), 6)
    model(text[:, :-1], text[:, 1:])[1].backward()


def test_model_generate_delegates():
    model = make()
    want = generate(model, prompt(), 6, temperature=0)
    assert torch.equal(model.generate(prompt(), 6, temperature=0), want)


@pytest.mark.parametrize("temperature", [0, 1e-40, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_end_in_one_line(bad, temperature):
    model, seen = make(position="rope"), []
    model.lm_head.weight.data[3] = bad
    with pytest.raises(UserError, match="NaN or infinite") as error:
        generate(model, prompt(), 5, temperature, stream=seen.append)
    assert "\n" not in str(error.value) and not seen


def test_one_bad_token_late_in_a_text_is_enough():
    """Its row of the table is damaged: all goes well until it is looked up."""
    model, seen = make(position="none", tie_embeddings=False), []
    text = generate(model, prompt(1), 6, temperature=0)[0].tolist()
    token = next(t for t in text[5:-1] if t not in text[:5])
    model.transformer.wte.weight.data[token] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        generate(model, prompt(1), 6, temperature=0, stream=seen.append)
    assert seen[-1] == [token]


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(idx=torch.zeros(1, 0, dtype=torch.int64)), "prompt is empty"),
        (dict(idx=torch.zeros(1, 25, dtype=torch.int64)), "25 tokens.*block_size=24"),
        (dict(idx=torch.tensor([[1, 99]])), "token id 99"),
        (dict(idx=torch.tensor([[1, -1]])), "token id -1"),
        (dict(max_new_tokens=0), "max_new_tokens must be positive, not 0"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.5), "top_p"),
        (dict(kv_bits=5), "kv_bits=5"),
        (dict(slide=0), "slide=0"),
        (dict(lengths=[9, 1]), "lengths"),
        (dict(lengths=[5, 0]), "lengths"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(idx=prompt(), max_new_tokens=4) | change
    with pytest.raises(UserError, match=message):
        generate(make(), **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("policy,n_kv_head", POLICIES)
@pytest.mark.parametrize("kernels", [False, True])
def test_captured_steps_write_what_eager_ones_do(
    policy, n_kv_head, position, dtype, kv_bits, kernels, monkeypatch
):
    monkeypatch.setattr("leangpt.decoding.generate.KERNELS_FROM", 0 if kernels else 1000)
    model = make(policy, n_kv_head, position=position, n_embd=128).to("cuda", dtype)
    idx, lengths = prompt(3, 9).cuda(), torch.tensor([4, 9, 1]).cuda()
    generator = torch.Generator("cuda")
    texts = []
    for capture in (True, False):

        def next_(loop, capture=capture):
            loop.captured = capture
            return original(loop)

        original, DecodeLoop.next = DecodeLoop.next, next_
        try:
            texts.append(
                generate(
                    model,
                    idx,
                    40,
                    top_k=10,
                    generator=generator.manual_seed(1),
                    lengths=lengths,
                    kv_bits=kv_bits,
                    slide=5,
                )
            )
        finally:
            DecodeLoop.next = original
    assert torch.equal(*texts)
