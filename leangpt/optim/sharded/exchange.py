"""Many sharded tensors in step: their sums in one reduction, each whole matrix on one rank.

The `direction` of an optimizer (base.py) is a generator where it needs the rows of other ranks. It
yields what it needs, and is sent the answer:

    a tensor                  -> the sum of it over the ranks
    Whole(rows, compute, ..)  -> the rows here of compute(the matrix that all ranks' rows make up)

Whoever drives such generators (`runs`) drives many of them together. Where all rows are here,
`run_alone` answers at once.

A matrix is computed on one rank, its owner; of a weight that stacks several (q, k, v; gate, up: its
row_blocks) each has its own. Owners are chosen so that all have equally much to do. Rows travel to
the owner and back (all-to-all, 2 n m / R numbers a rank and way for a matrix (n, m) on R ranks),
wave after wave of about one matrix a rank: while one wave is computed, the next is on its way there
and the one before on its way back.
"""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

WAVE = 1 << 24  # numbers that an owner computes at once, where one matrix has not more
TOGETHER = 1 << 24  # numbers of this rank's rows whose generators run together: float32 copies


@dataclass(slots=True)
class Whole:
    """A request: rows (1, n_here, m) of a weight; compute(matrices (N, n, m), group) -> same, for
    the matrices that are stacked in it."""

    rows: torch.Tensor
    compute: Callable
    group: dict


def run_alone(run):
    """Drive one generator whose tensor has all its rows here -> what it returns."""
    try:
        asked = next(run)
        while True:
            whole = isinstance(asked, Whole)
            asked = run.send(asked.compute(asked.rows, asked.group) if whole else asked)
    except StopIteration as done:
        return done.value


def run_sums(runs, shards, answers=None):
    """Drive generators that ask for sums alone; `answers`, if any, are sent to them first."""
    runs, answers = list(runs), answers or [None] * len(runs)
    while True:
        going, asked = [], []
        for run, answer in zip(runs, answers):
            try:
                asked.append(run.send(answer))
                going.append(run)
            except StopIteration:
                pass
        if not going:
            return
        flat = shards.sum(torch.cat([part.flatten() for part in asked]))
        sizes = [part.numel() for part in asked]
        answers = [s.view(part.shape).to(part.dtype) for s, part in zip(flat.split(sizes), asked)]
        runs = going


def in_portions(items, most=TOGETHER):
    """Lists of sharded items of together about `most` numbers a rank, alike on every rank."""
    portion, numbers = [], 0
    for item in items:
        portion.append(item)
        numbers += item.shards.shape.numel() // item.shards.ranks
        if numbers >= most:
            yield portion
            portion, numbers = [], 0
    if portion:
        yield portion


# ---------------------------------------------------------------------- whole matrices


def run_whole(items, start, loads):
    """Drive start(item) of each sharded matrix: a generator that asks for a Whole, then for sums.

    loads: list, the work each rank was given so far; added to.
    """
    shards = items[0].shards
    loads += [0.0] * (shards.ranks - len(loads))
    waiting = deque()
    for wave in waves(items, owners(items, loads), shards.ranks):
        runs = [start(item) for item, _ in wave]
        sent = Exchange(runs, wave)
        if waiting:
            waiting[-1][1].compute()
        waiting.append((runs, sent))
        if len(waiting) > 2:
            _finish(*waiting.popleft(), shards)
    waiting[-1][1].compute()
    while waiting:
        _finish(*waiting.popleft(), shards)


def _finish(runs, exchange, shards):
    run_sums(runs, shards, exchange.rows())


def blocks_of(item):
    """(start, stop) of the rows of each matrix in an item's weight, in order."""
    rows, sizes = item.shards.shape[0], item.group["row_blocks"]
    if not sizes or sum(sizes) != rows:
        sizes = (rows,)
    return [(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes))]


def columns_of(item):
    """Of an item's weight as a matrix."""
    shape = item.shards.shape
    return shape.numel() // max(1, shape[0])


def cost(rows, columns):
    """Of orthogonalising, in the same unit for all: the short side times the numbers."""
    return rows * columns * min(rows, columns)


def owners(items, loads):
    """For each item which rank computes each of its blocks: the dearest first, each for the rank
    with least to do."""
    chosen = [[0] * len(blocks_of(item)) for item in items]
    dear = [
        (cost(stop - start, columns_of(item)), i, j)
        for i, item in enumerate(items)
        for j, (start, stop) in enumerate(blocks_of(item))
    ]
    for price, i, j in sorted(dear, key=lambda each: -each[0]):
        chosen[i][j] = loads.index(min(loads))
        loads[chosen[i][j]] += price
    return chosen


def waves(items, chosen, ranks):
    """Lists of (item, owners of its blocks): in each an owner has matrices of together WAVE
    numbers, or those of one item. The dearest items come first."""
    made = []  # [numbers of each owner], wave
    dearest = [max(cost(b - a, columns_of(item)) for a, b in blocks_of(item)) for item in items]
    for index in sorted(range(len(items)), key=lambda i: -dearest[i]):
        item, added = items[index], [0] * ranks
        for (start, stop), owner in zip(blocks_of(item), chosen[index]):
            added[owner] += (stop - start) * columns_of(item)
        room = [
            (numbers, wave)
            for numbers, wave in made
            if all(not m or not n or n + m <= WAVE for n, m in zip(numbers, added))
        ]
        if not room:
            room = [([0] * ranks, [])]
            made += room
        numbers, wave = room[0]
        numbers[:] = map(sum, zip(numbers, added))
        wave.append((item, chosen[index]))
    return [wave for _, wave in made]


@dataclass(slots=True)
class Block:
    """Rows [start, stop) of the weight of a wave's index-th request: one matrix."""

    index: int
    start: int
    stop: int
    shards: object  # the weight's RowShards
    columns: int

    def rows_of(self, rank):
        """(start, stop) of its rows that a rank has, counted from its own first; perhaps none."""
        start, stop = self.shards.rows_of(rank)
        start = min(max(start, self.start), self.stop)
        return start - self.start, min(max(stop, start), self.stop) - self.start

    def size(self, rank):
        """How many of its numbers are that rank's."""
        start, stop = self.rows_of(rank)
        return (stop - start) * self.columns

    def cut(self, rows, rank):
        """Of that rank's rows (1, n_here, m) of the weight those of this block, flat."""
        first = self.shards.rows_of(rank)[0]
        start, stop = (self.start + row - first for row in self.rows_of(rank))
        return rows[0, max(start, 0) : max(stop, 0)].flatten()


class Exchange:
    """The matrices of one wave, on their way to their owners and back: beside the numbers that are
    on their way, one copy of those here and, while they are computed, of those that are alike."""

    def __init__(self, runs, wave):
        """Send this rank's rows. runs: of each (item, owners) the generator whose first request is
        a Whole; each request is let go of before the next is made."""
        self.shards = wave[0][0].shards
        self.owned = [[] for _ in range(self.shards.ranks)]  # of each rank its Blocks
        for index, (item, owners_) in enumerate(wave):
            for (start, stop), owner in zip(blocks_of(item), owners_):
                block = Block(index, start, stop, item.shards, columns_of(item))
                self.owned[owner].append(block)
        me = self.shards.rank
        self.there = [sum(block.size(me) for block in owned) for owned in self.owned]
        self.here = [sum(b.size(rank) for b in self.owned[me]) for rank in range(len(self.owned))]
        self.places = self._places()
        self.requests, self.shapes, sent = [], [], None
        for run, places in zip(runs, self.places):
            request = next(run)
            rows, request.rows = request.rows, None
            if sent is None:
                self.dtype = rows.dtype
                # on CUDA the products are bfloat16, whatever comes
                travelling = torch.bfloat16 if rows.is_cuda else rows.dtype
                sent = rows.new_empty(sum(self.there), dtype=travelling)
            for block, place in places:
                sent[place].copy_(block.cut(rows, me))
            self.requests.append(request)
            self.shapes.append(rows.shape)
            del rows
        self._send(sent, self.there, self.here)

    def _places(self):
        """For each request its [(Block, where this rank's rows of it lie in what it sends)], in
        the order of the weight's rows."""
        places, start = {}, 0
        for owned in self.owned:
            for block in owned:
                stop = start + block.size(self.shards.rank)
                places.setdefault(block.index, []).append((block, slice(start, stop)))
                start = stop
        return [sorted(places[i], key=lambda pair: pair[0].start) for i in range(len(places))]

    def _send(self, numbers, there, here):
        self.sent = numbers  # held until it has arrived
        self.arriving = numbers.new_empty(sum(here))
        self.work = dist.all_to_all_single(
            self.arriving,
            self.sent,
            here,
            there,
            group=group_apart(self.shards.group),
            async_op=True,
        )

    def _arrived(self):
        self.work.wait()
        arrived, self.arriving, self.sent, self.work = self.arriving, None, None, None
        return arrived

    def compute(self):
        """The owner's work; then its results travel back, from where the matrices had come to."""
        mine, ranks = self.owned[self.shards.rank], range(self.shards.ranks)
        arrived = self._arrived()
        parts = arrived.split([block.size(rank) for rank in ranks for block in mine])
        alike = {}  # parts: by rank, then by block
        for n, block in enumerate(mine):
            request = self.requests[block.index]
            key = (block.stop - block.start, block.columns, id(request.group), request.compute)
            alike.setdefault(key, []).append((request, parts[n :: len(mine)]))
        for (rows, columns, *_), same in alike.items():
            matrices = arrived.new_empty(len(same), rows, columns)
            for matrix, (_, pieces) in zip(matrices, same):
                torch.cat(pieces, out=matrix.view(-1))
            found = same[0][0].compute(matrices, same[0][0].group)
            for matrix, (_, pieces) in zip(found, same):
                for piece, result in zip(pieces, matrix.flatten().split([len(p) for p in pieces])):
                    piece.copy_(result)
            del matrices, found, matrix, result  # before the next are made
        self._send(arrived, self.here, self.there)

    def rows(self):
        """This rank's rows of every result, in the order of the requests."""
        arrived = self._arrived()
        found = []
        for places, shape in zip(self.places, self.shapes):
            pieces = [arrived[place] for _, place in places]
            rows = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            found.append(rows.view(shape).to(self.dtype))
        return found


@functools.cache
def group_apart(group):
    """A process group of the same ranks for the optimizer's own messages: it does not wait in line
    with the weights that are gathered for the layers."""
    return dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
