"""Many sharded tensors in step: their sums in one reduction, each whole matrix on one rank.

The `direction` of an optimizer (base.py) is a generator where it needs the rows of other ranks. It
yields what it needs, and is sent the answer:

    a tensor                  -> the sum of it over the ranks
    Whole(rows, compute, ..)  -> the rows here of compute(the matrix that all ranks' rows make up)

Whoever drives such generators (`runs`) drives many of them together. Where all rows are here,
`run_alone` answers at once.

A matrix is computed on one rank, its owner: owners are chosen so that all have equally much to do.
Rows travel to the owner and back (all-to-all, 2 n m / R numbers a rank and way for a matrix (n, m)
on R ranks), wave after wave of about one matrix a rank: while one wave is computed, the next is on
its way there and the one before on its way back.
"""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

WAVE = 1 << 24  # numbers that an owner computes at once, where one matrix has not more
TOGETHER = 1 << 26  # numbers of this rank's rows whose generators run together


@dataclass(slots=True)
class Whole:
    """A request: rows (1, n_here, m) of a matrix; compute(matrices (N, n, m), group) -> same."""

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
        sent = Exchange([next(run) for run in runs], wave)
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


def cost(item):
    """Of orthogonalising, in the same unit for all: the short side times the numbers."""
    shape = item.shards.shape
    numbers = shape.numel()
    return numbers * min(shape[0], numbers // max(1, shape[0]))


def owners(items, loads):
    """Which rank computes each item: the dearest first, each for the rank with least to do."""
    chosen = [0] * len(items)
    for index in sorted(range(len(items)), key=lambda i: -cost(items[i])):
        chosen[index] = loads.index(min(loads))
        loads[chosen[index]] += cost(items[index])
    return chosen


def waves(items, chosen, ranks):
    """Lists of (item, owner): in each an owner has matrices of together WAVE numbers, or one."""
    queues = [deque() for _ in range(ranks)]
    for index in sorted(range(len(items)), key=lambda i: -cost(items[i])):
        queues[chosen[index]].append(items[index])
    while any(queues):
        wave = []
        for owner, queue in enumerate(queues):
            numbers = 0
            while queue and (not numbers or numbers + queue[0].shards.shape.numel() <= WAVE):
                numbers += queue[0].shards.shape.numel()
                wave.append((queue.popleft(), owner))
        yield wave


class Exchange:
    """The matrices of one wave, on their way to their owners and back."""

    def __init__(self, requests, wave):
        """Send this rank's rows, and let go of them. requests: a Whole for each (item, owner)."""
        self.requests, self.layouts = requests, [item.shards for item, _ in wave]
        self.shards = shards = self.layouts[0]
        ranks = range(shards.ranks)
        self.owned = [[i for i, (_, owner) in enumerate(wave) if owner == r] for r in ranks]
        self.shapes = [request.rows.shape for request in requests]
        first = requests[0].rows
        self.dtype = first.dtype
        # on CUDA the products are bfloat16, whatever comes
        self.travelling = torch.bfloat16 if first.is_cuda else first.dtype
        flat = torch.cat([requests[i].rows.flatten() for owned in self.owned for i in owned])
        for request in requests:
            request.rows = None
        self.there = [sum(self._size(i, shards.rank) for i in owned) for owned in self.owned]
        self.here = [sum(self._size(i, r) for i in self.owned[shards.rank]) for r in ranks]
        self._send(flat, self.there, self.here)

    def _size(self, i, rank):
        """How many numbers of matrix i are that rank's."""
        start, stop = self.layouts[i].rows_of(rank)
        return (stop - start) * self.shapes[i][2]

    def _send(self, flat, there, here):
        self.sent = flat.to(self.travelling)  # held until it has arrived
        self.arriving = self.sent.new_empty(sum(here))
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
        arrived, self.arriving = self.arriving, None
        return arrived

    def compute(self):
        """The owner's work; then its results travel back."""
        mine, ranks = self.owned[self.shards.rank], range(self.shards.ranks)
        sizes = [self._size(i, rank) for rank in ranks for i in mine]
        parts = self._arrived().split(sizes)  # by rank, then by matrix
        alike = {}
        for n, i in enumerate(mine):
            matrix = torch.cat(parts[n :: len(mine)]).view(-1, self.shapes[i][2])
            request = self.requests[i]
            key = (matrix.shape, id(request.group), request.compute)
            alike.setdefault(key, []).append((i, matrix))
        del parts
        results = {}
        for same in alike.values():
            numbers, matrices = zip(*same)
            request = self.requests[numbers[0]]
            results |= zip(numbers, request.compute(torch.stack(matrices), request.group))
        pieces = [
            results[i][slice(*self.layouts[i].rows_of(rank))].flatten()
            for rank in ranks
            for i in mine
        ]
        flat = torch.cat(pieces) if pieces else self.sent.new_empty(0)
        self._send(flat, self.here, self.there)

    def rows(self):
        """This rank's rows of every result, in the order of the requests."""
        order = [i for owned in self.owned for i in owned]
        parts = self._arrived().split([self._size(i, self.shards.rank) for i in order])
        found = {i: part.view(self.shapes[i]).to(self.dtype) for i, part in zip(order, parts)}
        return [found[i] for i in range(len(self.requests))]


@functools.cache
def group_apart(group):
    """A process group of the same ranks for the optimizer's own messages: it does not wait in line
    with the weights that are gathered for the layers."""
    return dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
