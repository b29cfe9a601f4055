"""Writing text with a model: prefill the prompt, then one token at a time from a KV cache.

    prefill           the prompt, as in training, filling the cache -> logits after its last token
    decode_one_token  one token a row -> the next logits
    sample_token      a token from logits (decoding/sampling.py)

The last two are a step of the DecodeLoop (decoding/steps.py). Texts long enough to be worth their
compilation are written by Triton's kernels: kv_cache/cache_triton.py, and
decoding/step_triton.py for few rows.

Past block_size: with rope or no positions the cache rolls, and each layer attends to the newest
block_size tokens. Learned positions cannot roll, so the text is cropped to its newest
block_size + 1 - slide tokens and prefilled anew, each `slide` tokens. slide=1 is nanoGPT's rule
(every token sees the block_size tokens before it) at nanoGPT's price, one whole forward a token;
slide=block_size/4 costs little and sees at least three quarters of that.
"""

import time
from collections.abc import Callable, Iterable

import torch

from leangpt.decoding.sampling import Sampler
from leangpt.decoding.steps import DecodeLoop, TokenRows
from leangpt.kv_cache.cache import build_cache
from leangpt.system.errors import UserError

MOST_TOKENS = 2**27  # to write in a text: a table of them is made first
KERNELS_FROM = 1000  # tokens of work from which Triton's kernels are worth compiling, some seconds


def generate(
    model: torch.nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None,
    kv_bits: int | None = None,
    stream: Callable[[list[int]], None] | None = None,
    lengths: torch.Tensor | None = None,
    slide: int = 1,
    vocab_size: int | None = None,
    warmed: Callable[[float], None] | None = None,
) -> torch.Tensor:
    """Continue the prompts idx (B, T) int64 -> (B, T + max_new_tokens) int64.

    temperature, top_k, top_p, generator, vocab_size: the Sampler's. stop_tokens: ids after which a
    row only repeats that id. kv_bits: 8 or 4 for a quantised cache. stream(tokens): called with
    each step's B tokens. slide: see the top of the file.
    lengths (B,): real tokens of each prompt where they are unequal, padded on the right; row b of
    the result has lengths[b] + max_new_tokens tokens, then zeros.
    warmed(seconds): what only a first time takes, as building kernels, is done before anything is
    written, and told; by default it is part of the writing.
    Raises UserError for an empty prompt, one longer than block_size, a setting out of range, and
    where the model's logits turn out NaN or infinite.
    """
    check_count(max_new_tokens)
    sampler = Sampler(temperature, top_k, top_p, generator, vocab_size)
    lengths = check_prompt(model, idx, lengths)
    if not 1 <= slide <= model.config.block_size:
        raise UserError(f"slide={slide}: use 1 to block_size={model.config.block_size}")
    (B, T), block_size = idx.shape, model.config.block_size
    device, dtype = idx.device, model.transformer.wte.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            cache = build_cache(
                model.config, B, min(T + max_new_tokens, block_size), device, dtype, kv_bits
            )
            if max_new_tokens * max(1, cache.slot_count / 4096) < KERNELS_FROM:
                cache.kernel = None  # PyTorch's own do as well, and are there
            rows = TokenRows(idx, lengths, max_new_tokens, stop_tokens)
            loop = DecodeLoop(model, cache, sampler, rows)
            if warmed is not None:
                began = time.perf_counter()
                loop.warm_up(idx, lengths)
                warmed(time.perf_counter() - began)
            write(loop, max_new_tokens, stream, slide)
        return rows.tokens.clone()  # an ordinary tensor, fit for training on
    finally:
        model.train(training)


def write(loop, max_new_tokens, stream, slide):
    """Write max_new_tokens to each of the loop's rows, which hold the prompts alone."""
    cache, rows, block_size = loop.cache, loop.rows, loop.model.config.block_size
    loop.prefill(rows.tokens[:, : rows.length], rows.lengths)
    for count in range(1, max_new_tokens + 1):
        look = count == max_new_tokens or count % rows.check == 0
        if look or stream is not None:
            rows.check_finite()
        if stream is not None:
            stream(rows.token.flatten().tolist())
        if count == max_new_tokens or look and rows.all_stopped():
            break
        if cache.length == block_size and not cache.rolling:
            cropped, lengths = rows.newest(block_size, block_size + 1 - slide)
            cache.reset()
            loop.prefill(cropped, lengths)
        else:
            loop.next()
    rows.finish()


def check_count(max_new_tokens):
    """Raise UserError for a number of tokens that cannot be written."""
    if max_new_tokens <= 0:
        raise UserError(f"max_new_tokens must be positive, not {max_new_tokens}")
    if max_new_tokens > MOST_TOKENS:
        raise UserError(f"max_new_tokens must be at most {MOST_TOKENS:,}, not {max_new_tokens:,}")


def check_prompt(model, idx, lengths):
    """Raise UserError for prompts the model cannot read; returns lengths (B,) int64 or None."""
    config, (B, T) = model.config, idx.shape
    if T == 0 or B == 0:
        raise UserError("the prompt is empty: give at least one token")
    if T > config.block_size:
        raise UserError(
            f"the prompt has {T} tokens, the model reads at most "
            f"block_size={config.block_size}: shorten it"
        )
    low, high = int(idx.min()), int(idx.max())
    if low < 0 or high >= config.vocab_size:
        raise UserError(
            f"token id {low if low < 0 else high} is not in the model's vocabulary of "
            f"{config.vocab_size}"
        )
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths, device=idx.device)
    if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() != T:
        raise UserError(f"lengths must be {B} numbers from 1 to {T}, the longest being {T}")
    return None if lengths.min() == T else lengths


def bytes_read(model, length, kv_bits=None):
    """Bytes that one decoding step must read: (all weights, the cache of one row of `length`)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables.discard(id(getattr(model.lm_head, "weight", None)))  # a tied head reads its table
    tensors = [*model.buffers(), *(p for p in model.parameters() if id(p) not in tables)]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    few = min(16, model.config.block_size)
    cache = build_cache(
        model.config, 1, few, dtype=model.transformer.wte.weight.dtype, kv_bits=kv_bits
    )
    return weights, cache.bytes_per_token * min(length, model.config.block_size)
