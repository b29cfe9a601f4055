"""What the update of weights in shares takes for a moment, beyond weights, gradients and state.

A tensor whose update needs its own rows alone is updated as any of that shape is (update.py). What
asks for other processes' rows is done for many tensors together (optim/sharded/exchange.py):

    sums of rows     the directions, in float32, of a portion's tensors until the sums are there
    whole matrices   rows on their way, and the owner's matrices, of three waves; those of one that
                     are alike, and what orthogonalises them
"""

from types import SimpleNamespace

import torch

from leangpt.memory.update import FLOAT, is_matrix, momentum_bits, orthogonalizing, update_bytes
from leangpt.optim.sharded.exchange import blocks_of, columns_of, in_portions, owners, waves
from leangpt.optim.sharded.rows import RowShards


def update(run, tensors) -> int:
    """Bytes that the update of these tensors, all or some of a run's, takes at its worst."""
    known = tuple(map(id, run.tensors)), len(tensors), run.device_type
    if known not in _known:
        if len(_known) > 10_000:
            _known.clear()
        spread = [t for t in tensors if asks(t)]
        alone = [t for t in tensors if not asks(t)]
        matrices = [t for t in spread if is_matrix(t)]
        others = [t for t in spread if not is_matrix(t)]
        found = (
            update_bytes(run, alone) if alone else 0,
            exchanged(run, matrices) if matrices else 0,
            summed_together(others),
        )
        _known[known] = run.tensors, max(found)  # the list itself too: its ids stay its own
    return _known[known][1]


_known = {}  # what `update` found


def asks(tensor) -> bool:
    """Does its direction ask for other processes' rows?"""
    if tensor.cls is torch.optim.AdamW:
        return False
    like, shards = torch.empty(tensor.shape, device="meta"), shards_of(tensor)
    return tensor.cls.__new__(tensor.cls).needs_ranks(like, tensor.group, shards)


def shards_of(tensor):
    """Its RowShards."""
    return RowShards.planned((tensor.rows, *tensor.shape[1:]), tensor.shares)


def items_of(tensors):
    """What exchange.py wants of an item: its shards and its group; beside them the Kept."""
    each = [SimpleNamespace(shards=shards_of(t), group=t.group, kept=t) for t in tensors]
    return [item for item in each for _ in range(item.kept.count)]


def summed_together(tensors) -> int:
    """Of generators that ask for sums alone: of all of a portion the direction, in float32, stands;
    of the first what it takes to write it."""
    worst = 0
    for portion in in_portions(items_of(tensors)):
        kept = [item.kept for item in portion]
        held = sum(held_for_sums(t) * t.numbers for t in kept)
        for tensor in kept:  # one after the other is written and let go of
            writing = (1 + 1.75) * (tensor.itemsize < FLOAT) * tensor.numbers
            worst = max(worst, FLOAT * (held + writing))
            held -= held_for_sums(tensor) * tensor.numbers
    return int(worst)


def held_for_sums(tensor) -> int:
    """float32 numbers for each of a tensor's own, until all processes' sums are there."""
    if "column_mean_square" in tensor.state:
        return 1 + (momentum_bits(tensor) > 0)
    return (tensor.itemsize < FLOAT) + (momentum_bits(tensor) in (16, 8, 4)) + 1


def exchanged(run, tensors) -> int:
    """Of whole matrices: three waves are on their way at a time, of which the middle one is
    computed. Of the process that has most at its fullest."""
    items, ranks = items_of(tensors), run.shares
    size = FLOAT if run.device_type == "cpu" else 2  # bytes of a number that travels
    made = [Wave(run, wave, size) for wave in waves(items, owners(items, [0.0] * ranks), ranks)]
    none = SimpleNamespace(moving=[0] * ranks)
    padded = [none, none, *made, none, none]
    worst = 0
    for before, now, after in zip(padded, padded[1:], padded[2:]):
        for rank in range(ranks):
            others = before.moving[rank] + after.moving[rank]
            for stage in ("sending", "computing", "finishing"):
                beside = {
                    "sending": before.moving[rank],  # and the one before that, which is on its way
                    "computing": others,
                    "finishing": after.moving[rank],
                }[stage]
                if now is not none:
                    worst = max(worst, beside + getattr(now, stage)[rank])
    return int(worst)


class Wave:
    """Bytes of a wave's stages, for each rank."""

    def __init__(self, run, wave, size):
        ranks, kept = range(run.shares), [item.kept for item, _ in wave]
        here = [
            sum((b - a) * columns_of(i) for i, _ in wave for a, b in [i.shards.rows_of(r)])
            for r in ranks
        ]
        owned = [{} for _ in ranks]  # (rows, columns) -> how many
        for item, chosen in wave:
            for (start, stop), owner in zip(blocks_of(item), chosen):
                key = stop - start, columns_of(item)
                owned[owner][key] = owned[owner].get(key, 0) + 1
        mine = [sum(n * rows * columns for (rows, columns), n in o.items()) for o in owned]
        narrow = kept[0].itemsize < FLOAT
        bits = momentum_bits(kept[0])
        largest = max(t.numbers for t in kept)
        value = bits in (16, 8, 4)
        direction = narrow + max({16: 2.5, 8: 4, 4: 4}.get(bits, 0), value + (bits > 0))
        rows = FLOAT if size < FLOAT else FLOAT * any(len(blocks_of(i)) > 1 for i, _ in wave)
        self.moving = [size * (h + m) for h, m in zip(here, mine)]
        self.sending = [
            size * h + max(FLOAT * direction * largest, size * m) for h, m in zip(here, mine)
        ]
        self.computing = [
            size * m + max((computing(run, *key, n, size) for key, n in o.items()), default=0)
            for m, o in zip(mine, owned)
        ]
        self.finishing = [(size + rows) * h + FLOAT * narrow * (1 + 1.75) * largest for h in here]


def computing(run, rows, columns, count, size) -> float:
    """Bytes of some matrices alike, and of orthogonalising them."""
    alike = SimpleNamespace(shape=(rows, columns), group={"row_blocks": None})
    return count * rows * columns * size + orthogonalizing(run, alike, count, size)
