"""What gradients summed in 8 or 4 bits take (optim/backward/gradient_sums.py): the sums that stand
between backward passes, what adding one gradient takes for a moment, and the step that uses them.

Counted in float32 numbers for each number of a chunk that is added at once:

    the gradient as float32, or its sum with the earlier ones   1: not of a first one in float32
    padded to whole blocks                                      1 where it is not so already
    rounded                                                     1
    two of the dither, its blocks' bits                         2 and 1/16
"""

from dataclasses import replace

from leangpt.memory.update import FLOAT, one_by_one, update_bytes
from leangpt.optim.backward.gradient_sums import CHUNK, TOGETHER
from leangpt.optim.momentum import BLOCK

DITHER = 2 + 1 / 16


def standing(run, tensor) -> int:
    """Bytes of one tensor's gradient between backward passes: its sum's where it is in few bits."""
    if not run.gradient_bits:
        return tensor.bytes
    return -(-tensor.numbers // BLOCK) * (BLOCK * run.gradient_bits // 8 + 2)


def taking(run, tensors) -> int:
    """Bytes that the hooks of fused_backward or gradient_bits take for a moment, at their worst."""
    if not run.gradient_bits:
        return one_by_one(run, tensors)
    return max((_adding(run, tensor) for tensor in tensors), default=0)


def _adding(run, tensor):
    numbers = min(tensor.numbers, CHUNK)
    padded = tensor.numbers <= CHUNK and numbers % BLOCK > 0
    first = run.micro_batches == 1  # whose sum does not stand yet
    wide = 0 if first and tensor.itemsize == FLOAT else 1
    return int((wide + padded + 1 + DITHER) * numbers * FLOAT) + first * standing(run, tensor)


def at_step(run) -> tuple[int, int]:
    """(bytes of sums and gradients, bytes of what the step takes beside them) at its worst.

    Sums become gradients as many at a time as have TOGETHER numbers, which are updated and freed.
    """
    if not run.gradient_bits:
        return sum(t.bytes * t.count for t in run.tensors), update_bytes(run)
    key = id(run.tensors), run.device_type  # nothing else of a run matters
    if key not in _known:
        if len(_known) > 10_000:
            _known.clear()
        _known[key] = run.tensors, _at_step(run)  # the list itself too, so that its id stays its
    return _known[key][1]


_known = {}  # what at_step found


def _at_step(run):
    left = sum(standing(run, t) * t.count for t in run.tensors)
    worst = [(left, max(_reading(run, t) for t in run.tensors))]  # for the norm of all
    updates = {}  # what is alike for many layers
    for work in _batches(run):
        held = 0
        for tensor in work:
            held += tensor.bytes
            worst.append((left + held, _reading(run, tensor, tensor.itemsize < FLOAT)))
            left -= standing(run, tensor)
        alike = tuple(map(id, work))
        if alike not in updates:
            once = dict(zip(alike, work))
            counted = [replace(t, count=alike.count(key)) for key, t in once.items()]
            updates[alike] = update_bytes(run, counted)
        worst.append((left + held, updates[alike]))
    return max(worst, key=sum)


def _reading(run, tensor, rounding=False):
    """Bytes of a sum's chunk as float32; rounded to bfloat16, too."""
    unpacked = 1 / 4 if run.gradient_bits == 4 else 0
    return int(max(DITHER + unpacked, 2.5 * rounding) * min(tensor.numbers, CHUNK) * FLOAT)


def _batches(run):
    """Lists of tensors that are updated together: role by role, of each every layer's."""
    work, size = [], 0
    for tensor in (t for alike in run.tensors for t in [alike] * alike.count):
        if work and size + tensor.numbers > TOGETHER:
            yield work
            work, size = [], 0
        work.append(tensor)
        size += tensor.numbers
    yield work
