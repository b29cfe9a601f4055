"""The rows being written, and one decoding step after another.

On CUDA a step (decode_one_token and the sampler) is captured once in a CUDA graph and replayed: no
launches from Python, no allocation, no host synchronisation but for a look every CHECK tokens
whether all rows have stopped.
"""

from functools import partial

import torch

from leangpt.decoding import step_cpu, step_triton
from leangpt.system.errors import UserError

CHECK = 32  # tokens between looks at the device
WARM_UP, WARM_UP_CUDA = 16, 4096  # tokens of a prompt that are read to warm up


class TokenRows:
    """The texts being written, in place, on the device.

    idx (B, T) int64: the prompts; lengths (B,): their real tokens where they are padded on the
    right, or None. stop_tokens: ids after which a row only repeats that id.
    """

    def __init__(self, idx, lengths, max_new_tokens, stop_tokens=()):
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
        self.evidence = torch.zeros(B, device=idx.device)  # summed up: finite if it always was
        self.check = CHECK if idx.is_cuda else 1  # looking costs CUDA a synchronisation

    def add(self, tokens, evidence):
        """Write one more token (B,) to each row; a stopped row repeats its last.

        evidence (B,): sample_token's.
        """
        tokens = tokens[:, None]
        if len(self.stops):
            tokens = torch.where(self.stopped[:, None], self.token, tokens)
            self.stopped |= torch.isin(tokens, self.stops).squeeze(1)
        self.token.copy_(tokens)
        self.tokens.scatter_(1, self.ends[:, None], tokens)
        self.evidence += evidence
        self.ends += 1
        self.length += 1

    def begin(self, ids):
        """Hold one row that goes on after `ids` (list[int]), whatever was written before."""
        self.tokens[0, : len(ids)] = torch.tensor(ids, device=self.tokens.device)
        self.ends.fill_(len(ids))
        self.length = len(ids)
        self.stopped.fill_(False)
        self.evidence.zero_()

    def all_stopped(self):
        """Has every row stopped? Waits for the device."""
        return bool(self.stopped.all())

    def check_finite(self):
        """Raise UserError where a token was chosen from logits that are no numbers."""
        if not self.evidence.isfinite().all():
            raise UserError(
                "the model's predictions are NaN or infinite: its weights are damaged, or its "
                "numbers too large for the dtype (try float32)"
            )

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
            self.add(self.token.squeeze(1), 0.0)


class DecodeLoop:
    """Steps of a model that write rows: eager on the CPU, a replayed CUDA graph on CUDA.

    A step goes through decoding/step_triton.py or step_cpu.py where those support the model.
    """

    def __init__(self, model, cache, sampler, rows):
        self.model, self.cache, self.sampler, self.rows = model, cache, sampler, rows
        self.addresses = addresses_of(model)  # which kernels and graphs keep
        self.captured = cache.fixed_shapes = rows.token.is_cuda
        self.decode = model.decode_one_token
        if self.captured and step_triton.supports(model, cache):
            self.decode = partial(step_triton.decode_one_token, model)
        elif not self.captured and step_cpu.supports(model, cache):
            self.decode = step_cpu.Step(model, cache)
        self.graph = self.span = None

    def fits(self):
        """Are the model's weights where they were when this loop was made?"""
        return self.addresses == addresses_of(self.model)

    def prefill(self, idx, lengths=None):
        """Read idx (B, T) into the empty cache, and add the tokens that follow."""
        self.rows.add(*self.sampler(self.model.prefill(idx, self.cache, lengths)))

    def warm_up(self, idx, lengths=None):
        """Read the prompts' first tokens and take one step, then forget both.

        What only the first time takes is over then: kernels are built or compiled, libraries
        loaded, and on CUDA the step is captured.
        """
        rows, generator = self.rows, self.generator()
        state = [rows.tokens, rows.token, rows.ends, rows.stopped, rows.evidence]
        before, length = [tensor.clone() for tensor in state], rows.length
        random = generator.get_state()
        some = WARM_UP_CUDA if self.captured else WARM_UP
        self.prefill(idx[:, :some], None if lengths is None else lengths.clamp(max=some))
        if rows.length < rows.tokens.size(1) and self.cache.length < self.cache.max_length:
            self.next()
        rows.check_finite()  # waits for the device
        for tensor, old in zip(state, before):
            tensor.copy_(old)
        rows.length = length
        self.cache.reset()
        generator.set_state(random)

    def next(self):
        """Decode the newest tokens and add the ones that follow."""
        if not self.captured:
            return self.step()
        if self.graph is None or self.span != self.cache.span:
            self.capture()
        self.graph.replay()
        self.cache.length += 1  # what the graph cannot do: the host's counts
        self.rows.length += 1

    def generator(self):
        """What the sampler draws from."""
        if self.sampler.generator is not None:
            return self.sampler.generator
        if self.captured:
            return torch.cuda.default_generators[self.rows.token.device.index or 0]
        return torch.default_generator

    def step(self):
        logits = self.decode(self.rows.token, self.cache)
        self.rows.add(*self.sampler(logits))

    def capture(self):
        """Record one step. Trying it first, outside, lets kernels compile and memory settle.

        A try writes only what the step it stands for will write again.
        """
        cache, rows = self.cache, self.rows
        state = [cache.positions, rows.token, rows.ends, rows.stopped, rows.evidence]
        before = [tensor.clone() for tensor in state]
        counts = cache.length, rows.length
        generator = self.generator()
        random = generator.get_state()

        def restore():
            for tensor, old in zip(state, before):
                tensor.copy_(old)
            cache.length, rows.length = counts
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
        cache.length, rows.length = counts
        self.span = cache.span


def addresses_of(model):
    """Where the weights of a model lie, and of what type they are."""
    return [(t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers())]
