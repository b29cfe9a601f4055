"""A text that goes on, turn after turn: what was read and written stays in one KV cache, so that a
turn costs what it adds to the text and not what came before."""

from collections.abc import Iterable, Iterator

import torch

from leangpt.decoding.generate import check_count
from leangpt.decoding.sampling import Sampler
from leangpt.decoding.steps import DecodeLoop, TokenRows
from leangpt.kv_cache.cache import build_cache
from leangpt.system.errors import UserError

AT_ONCE = 512  # new tokens that are read in one step: its scores and mask are held whole
SMALLEST = 1024  # tokens that a cache has room for at first; then it doubles


class Conversation:
    """One model's side of a conversation."""

    def __init__(
        self,
        model: torch.nn.Module,
        sampler: Sampler,
        stop_tokens: Iterable[int] = (),
        kv_bits: int | None = None,
    ):
        """stop_tokens: ids that end an answer. kv_bits: 8 or 4 for a quantised cache."""
        self.model, self.sampler, self.kv_bits = model.eval(), sampler, kv_bits
        self.stop_tokens = tuple(stop_tokens)
        self.known = []  # the tokens whose keys and values are in the cache
        self.loop = None
        self.read_tokens = 0  # by all turns, beside those that were written

    def answer(self, ids: list[int], max_new_tokens: int) -> Iterator[int]:
        """Go on after the text `ids`, which may begin as the last one did: yield each new token.

        Ends before a stop token, after max_new_tokens, or at block_size. Whoever stops taking
        tokens may ask again with another text. Raises UserError where `ids` leave no room.
        """
        check_count(max_new_tokens)
        room = self.model.config.block_size - len(ids)
        if not ids or room < 1:
            raise UserError(
                f"a text of {len(ids)} tokens cannot go on: the model reads 1 to "
                f"block_size={self.model.config.block_size}"
            )
        count = min(max_new_tokens, room)
        self._make_room(len(ids) + count)
        rows = self.loop.rows
        rows.begin(ids)
        with torch.inference_mode():
            rows.add(*self.sampler(self._read(ids)))
        for written in range(1, count + 1):
            rows.check_finite()
            token = int(rows.token)
            if token in self.stop_tokens:
                return
            yield token
            if written < count:
                with torch.inference_mode():
                    self.loop.next()
                self.known.append(token)

    def _make_room(self, length):
        """A cache and rows for `length` tokens; a larger one begins empty, and one for weights that
        lie elsewhere than at the last turn."""
        loop = self.loop
        if loop is not None and length <= loop.cache.max_length and loop.fits():
            return
        size = SMALLEST
        while size < length:
            size *= 2
        config, weight = self.model.config, self.model.transformer.wte.weight
        size = min(size, config.block_size)
        cache = build_cache(config, 1, size, weight.device, weight.dtype, self.kv_bits)
        rows = TokenRows(torch.zeros(1, 0, dtype=torch.int64, device=weight.device), None, size)
        self.loop, self.known = DecodeLoop(self.model, cache, self.sampler, rows), []

    def _read(self, ids):
        """Bring the cache to `ids`, reading no more of them than is new -> logits (1, V)."""
        cache, same = self.loop.cache, 0
        while same < min(len(self.known), len(ids) - 1) and self.known[same] == ids[same]:
            same += 1
        if same < len(self.known) and self.kv_bits is not None:
            same = 0
        cache.reset(same)
        self.known = self.known[:same]
        self.read_tokens += len(ids) - same
        idx = torch.tensor([ids], device=cache.positions.device)
        if same == 0:
            logits = self.model.prefill(idx, cache)
        else:
            for start in range(same, len(ids), AT_ONCE):
                logits = self.model.decode_one_token(idx[:, start : start + AT_ONCE], cache)
        self.known = list(ids)
        return logits
