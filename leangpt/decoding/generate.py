"""Writing text with a model: prefill the prompt, then one token at a time from a KV cache.

    prefill           the prompt, as in training, filling the cache -> logits after its last token
    decode_one_token  one token a row -> the next logits
    pick              a token from logits, on the device, from the generator's own random numbers

On CUDA a step (decode_one_token and pick) is captured once in a CUDA graph and replayed: no
launches from Python, no allocation, no host synchronisation but for `stream` and a look every
CHECK tokens whether all rows have stopped. Texts long enough to be worth their compilation are
written by Triton's kernels: attention/kv_cache_triton.py, and decoding/step_triton.py for few rows.

Past block_size: with rope or no positions the cache rolls, and each layer attends to the newest
block_size tokens. Learned positions cannot roll, so the text is cropped to its newest
block_size + 1 - slide tokens and prefilled anew, each `slide` tokens. slide=1 is nanoGPT's rule
(every token sees the block_size tokens before it) at nanoGPT's price, one whole forward a token;
slide=block_size/4 costs little and sees at least three quarters of that.
"""

from functools import partial

import torch

from leangpt.attention.kv_cache import build_cache
from leangpt.decoding import step_cpu, step_triton
from leangpt.system.errors import UserError

CHECK = 32  # tokens between looks at whether every row has stopped
SHORTLIST = 1024  # most likely tokens sorted first for top_p
KERNELS_FROM = 1000  # tokens of work from which Triton's kernels are worth compiling, some seconds


def generate(
    model,
    idx,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    stop_tokens=(),
    generator=None,
    kv_bits=None,
    stream=None,
    lengths=None,
    slide=1,
    vocab_size=None,
    compile=False,
):
    """Continue the prompts idx (B, T) int64 -> (B, T + max_new_tokens) int64.

    temperature: 0 takes the most likely token. top_k: only the k most likely; top_p: only the
    fewest that hold that probability. stop_tokens: ids after which a row only repeats that id.
    generator: of random numbers, on the model's device. kv_bits: 8 or 4 for a quantised cache.
    stream(tokens): called with each step's B tokens, a list of int. vocab_size: ids from there on
    are never chosen (padding of the table). slide: see the top of the file. compile: run the step
    through torch.compile.
    lengths (B,): real tokens of each prompt where they are unequal, padded on the right; row b of
    the result has lengths[b] + max_new_tokens tokens, then zeros.
    Raises UserError for an empty prompt, one longer than block_size, or a setting out of range.
    """
    check_settings(max_new_tokens, temperature, top_k, top_p)
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
            choice = Choice(temperature, top_k, top_p, generator, vocab_size)
            text = Text(idx, lengths, max_new_tokens, stop_tokens)
            steps = Steps(model, cache, choice, text, compile)
            write(steps, max_new_tokens, stream, slide)
        return text.tokens.clone()  # an ordinary tensor, fit for training on
    finally:
        model.train(training)


def write(steps, max_new_tokens, stream, slide):
    """Write max_new_tokens to each row of the text, which holds the prompts alone."""
    cache, text, block_size = steps.cache, steps.text, steps.model.config.block_size
    steps.prefill(text.tokens[:, : text.length], text.lengths)
    for count in range(1, max_new_tokens + 1):
        if stream is not None:
            stream(text.token.flatten().tolist())
        if count == max_new_tokens or count % text.check == 0 and text.stopped.all():
            break
        if cache.length == block_size and not cache.rolling:
            cropped, lengths = text.newest(block_size, block_size + 1 - slide)
            cache.reset()
            steps.prefill(cropped, lengths)
        else:
            steps.next()
    text.finish()


def check_settings(max_new_tokens, temperature=1.0, top_k=None, top_p=None):
    """Raise UserError for sampling settings out of range."""
    if max_new_tokens <= 0:
        raise UserError(f"max_new_tokens must be positive, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (greedy) or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be positive, or None for all tokens, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], not {top_p}")


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


class Choice:
    """The rule that picks a token from logits."""

    def __init__(self, temperature=1.0, top_k=None, top_p=None, generator=None, vocab_size=None):
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator, self.vocab_size = generator, vocab_size

    def __call__(self, logits):
        return pick(
            logits[:, : self.vocab_size], self.temperature, self.top_k, self.top_p, self.generator
        )


def pick(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B, V) -> one token a row, (B,) int64.

    One uniform number a row goes through the inverse of the cumulative distribution: 50,000
    exponentials for an argmax would cost a CPU more than a 4-bit layer does.
    """
    if temperature == 0:
        return logits.argmax(-1)
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
    return (chosen if order is None else order.gather(-1, chosen)).squeeze(-1)


def most_likely(p, top_p):
    """p (B, V) sorted downwards, and the tokens; on the CPU no more of them than needed."""
    if p.device.type == "cpu" and p.size(-1) > SHORTLIST:
        likely, order = p.topk(SHORTLIST)
        if bool((likely.sum(-1) >= top_p).all()):
            return likely, order
    return p.sort(dim=-1, descending=True)


class Text:
    """The rows being written, in place, on the device."""

    def __init__(self, idx, lengths, max_new_tokens, stop_tokens):
        B, T = idx.shape
        self.tokens = idx.new_zeros(B, T + max_new_tokens)
        self.tokens[:, :T] = idx
        self.lengths = lengths  # of the prompts, (B,); None where all are T
        self.ends = idx.new_full((B,), T) if lengths is None else lengths.clone()
        if lengths is not None:  # whatever padded the prompts
            self.tokens *= torch.arange(T + max_new_tokens, device=idx.device) < self.ends[:, None]
        self.length = T  # of the longest row
        self.token = idx.new_zeros(B, 1)  # the newest of each row
        self.stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=idx.device)
        self.stopped = torch.zeros(B, dtype=torch.bool, device=idx.device)
        self.check = CHECK if idx.is_cuda else 1  # looking costs CUDA a synchronisation

    def add(self, tokens):
        """Write one more token (B,) to each row; a stopped row repeats its last."""
        tokens = tokens[:, None]
        if len(self.stops):
            tokens = torch.where(self.stopped[:, None], self.token, tokens)
            self.stopped |= torch.isin(tokens, self.stops).squeeze(1)
        self.token.copy_(tokens)
        self.tokens.scatter_(1, self.ends[:, None], tokens)
        self.ends += 1
        self.length += 1

    def newest(self, limit, keep):
        """The newest `keep` tokens of rows longer than `limit`, whole rows otherwise.

        Returns them (B, n), padded on the right, and their lengths (B,), None where all are n.
        """
        if self.lengths is None:
            return self.tokens[:, self.length - keep : self.length], None
        lengths = torch.where(self.ends > limit, keep, self.ends)
        at = torch.arange(int(lengths.max()), device=lengths.device)
        at = ((self.ends - lengths)[:, None] + at).clamp(max=self.tokens.size(1) - 1)
        return self.tokens.gather(1, at), lengths

    def finish(self):
        """All rows to their full length: all have stopped, and repeat their stop tokens."""
        for _ in range(self.length, self.tokens.size(1)):
            self.add(self.token.squeeze(1))


class Steps:
    """One decoding step after another: eager on the CPU, a replayed CUDA graph on CUDA."""

    def __init__(self, model, cache, choice, text, compile=False):
        self.model, self.cache, self.choice, self.text = model, cache, choice, text
        self.captured = text.token.is_cuda
        cache.fixed_shapes = self.captured or compile
        self.decode = model.decode_one_token
        if self.captured and not compile and step_triton.suits(model, cache):
            self.decode = partial(step_triton.decode_one_token, model)
        if not self.captured and not compile and step_cpu.suits(model, cache):
            self.decode = step_cpu.Step(model, cache)
        if compile:
            self.compiled = torch.compile(self.decode)
            self.decode = self.decode_compiled
        self.graph = self.span = None

    def prefill(self, idx, lengths):
        """Read idx (B, T) into the empty cache, and add the tokens that follow."""
        self.text.add(self.choice(self.model.prefill(idx, self.cache, lengths)))

    def next(self):
        """Decode the newest tokens and add the ones that follow."""
        if not self.captured:
            return self.step()
        if self.graph is None or self.span != self.cache.span:
            self.capture()
        self.graph.replay()
        self.cache.length += 1  # what the graph cannot do: the host's counts
        self.text.length += 1

    def step(self):
        logits = self.decode(self.text.token, self.cache)
        self.text.add(self.choice(logits))

    def decode_compiled(self, token, cache):
        """The compiled step, shown a count that changes with the shapes only: it would be
        compiled again for each other value, and uses it for the shapes alone."""
        length = cache.length
        cache.length = min(cache.span, cache.max_length) - 1
        logits = self.compiled(token, cache)
        cache.length = length + 1
        return logits

    def capture(self):
        """Record one step. Trying it first, outside, lets kernels compile and memory settle.

        A try writes only what the step it stands for will write again.
        """
        cache, text = self.cache, self.text
        state = [cache.positions, text.token, text.ends, text.stopped]
        before = [tensor.clone() for tensor in state]
        counts = cache.length, text.length
        generator = self.choice.generator
        if generator is None:
            generator = torch.cuda.default_generators[text.token.device.index or 0]
        random = generator.get_state()

        def restore():
            for tensor, old in zip(state, before):
                tensor.copy_(old)
            cache.length, text.length = counts
            generator.set_state(random)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            self.step()
        cache.length, text.length = counts
        self.span = cache.span


def bytes_read(model, length, kv_bits=None):
    """Bytes that one decoding step must read: (all weights, the cache of one row of `length`)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables.discard(id(getattr(model.lm_head, "weight", None)))  # a tied head reads its table
    tensors = [*model.buffers(), *(p for p in model.parameters() if id(p) not in tables)]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    cache = build_cache(
        model.config, 1, 16, dtype=model.transformer.wte.weight.dtype, kv_bits=kv_bits
    )
    return weights, cache.bytes_per_token * min(length, model.config.block_size)


def calibration(model, rows=None, tokens=64, seed=0, text=None):
    """For int4.quantize_: a function that runs the model once on a text it has written itself.

    That is always at hand: `rows` texts of `tokens` tokens, by default 512 for a small model, down
    to 64 for a large one. A model that was trained on much more than it will be used for is better
    rounded on `text` (rows, tokens) int64 of that use, at least some 10,000 tokens of it.
    """
    if text is not None:
        return partial(run_linears, model, text)
    if rows is None:
        rows = max(64, min(512, 2**32 // sum(p.numel() for p in model.parameters())))
    return partial(run_linears, model, own_text(model, rows, tokens, seed))


def own_text(model, rows, tokens, seed=0):
    """Texts (rows, tokens) int64 that the model writes, each from a token at random.

    tokens: at most block_size of them.
    """
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    text = torch.randint(model.config.vocab_size, (rows, 1), generator=generator, device=device)
    tokens = min(tokens, model.config.block_size)
    return text if tokens == 1 else generate(model, text, tokens - 1, generator=generator)


@torch.no_grad()
def run_linears(model, text):
    """Call each linear once on text (rows, tokens) int64."""
    x = model.embed(text)
    for block in model.transformer.h:
        x = block.plain(x)
    model.lm_head(model.transformer.ln_f(x))
