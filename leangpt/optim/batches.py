"""From gradients to weights in few launches: equally shaped tensors move together.

A step makes an Item of each parameter, its gradient and its state; stacks the small ones that share
a shape and hyperparameters, whatever their group, so that a hundred little matrices cost the
launches of one (`foreach=True`); takes the large ones one at a time (a copy would cost more than
the launches); asks the optimizer for the direction of each batch; and writes the weights back.
Statistics and arithmetic are float32 (float64 for float64 parameters) whatever the parameter's
dtype; bfloat16 parameters are rounded stochastically. Nothing waits for the device.
"""

from dataclasses import dataclass, field

import torch

from leangpt.optim.arithmetic import clip_update, compute_dtype, shift, stack
from leangpt.optim.kernels.dispatch import Dispatch
from leangpt.optim.momentum import round_to_bfloat16
from leangpt.optim.sharded.exchange import in_portions, run_alone, run_sums
from leangpt.optim.sharded.rows import RowShards, is_sharded, local, local_state, shard_state
from leangpt.system.errors import UserError

STACK_EACH = 1 << 18  # tensors of at most this many numbers are stacked ...
STACK_TOTAL = 1 << 20  # ... up to this many numbers in one stack: several times 4 MB
RANK_STRIDE = 1 << 20  # parameters that an optimizer has at most
VARYING = {
    "params",
    "lr",
    "initial_lr",
    "weight_decay",
    "name",
    "transposed",
}  # may differ within a stack


@dataclass(slots=True)
class Item:
    """One tensor to update. `param`, `grad` and `state` are local shards, perhaps row slices."""

    param: torch.Tensor
    grad: torch.Tensor
    state: dict  # name -> tensor, without the step count
    group: dict
    step: int  # 1 at the first update
    shards: RowShards | None = None  # where the other rows are, if the direction asks for them
    number: int = 0  # the parameter's place among all of the optimizer's, and in noise the rank's
    saved: dict | None = None  # the state's own tensors, of which `state` has this rank's part


@dataclass(slots=True)
class Batch:
    """N equally shaped tensors on their way through an optimizer's `direction`."""

    grad: torch.Tensor  # (N, *shape) float32 or float64; not to be written to
    state: dict  # name -> (N, ...) tensors, to be updated in place
    group: dict  # the hyperparameters that all N share
    schedule: tuple  # the optimizer's numbers of this step
    params: list  # the N parameters themselves
    step: int = 0  # how many steps they have taken, this one included
    shards: RowShards | None = None
    generator: object = None  # () -> torch.Generator of this step's rounding


@dataclass
class Kept:
    """What an optimizer keeps between steps for speed alone; forgotten at any time."""

    items: dict = field(default_factory=dict)  # parameter -> its Item of the step before
    numbers: dict = field(default_factory=dict)  # parameter -> its place in the optimizer
    generators: dict = field(default_factory=dict)  # device -> this step's torch.Generator
    loads: list = field(default_factory=list)  # rank -> work on whole matrices given to it
    kernels: Dispatch = field(default_factory=Dispatch)


# ---------------------------------------------------------------------- items


def make_item(optimizer, p, group):
    """The Item of parameter `p`, its state made if this is its first step, its step counted.

    Kept from step to step while group and state tensors stay what they are.
    """
    kept, state = optimizer.kept, optimizer.state[p]
    item = kept.items.get(p)
    if item is not None and item.group is group and state:
        if all(state[name] is value for name, value in item.saved.items()):
            state["step"] += 1
            item.step = state["step"]
            item.param, item.grad = parameter_and_gradient(p, group)
            return item
    shards = RowShards(p) if is_sharded(p) else None
    if shards and group["transposed"]:
        raise UserError("weights stored (in, out) cannot be sharded by rows: Conv1D under FSDP2")
    param, grad = parameter_and_gradient(p, group)
    if not state:
        state["step"] = 0
        for name, value in optimizer.new_state(param, group, shards).items():
            if shards:
                spans = optimizer.spans_rows(name, param, group, shards)
                value = shard_state(name, value, p, spans)
            state[name] = value
    state["step"] += 1
    saved = {name: value for name, value in state.items() if name != "step"}
    tensors = {name: local_state(name, value, state) for name, value in saved.items()}
    if p not in kept.numbers:
        everything = [q for g in optimizer.param_groups for q in g["params"]]
        kept.numbers = {q: number for number, q in enumerate(everything)}
    number = kept.numbers[p]
    if shards:  # rows elsewhere are rounded by other noise
        number += shards.rank * RANK_STRIDE
        if not optimizer.needs_ranks(param, group, shards):
            shards = None
    item = Item(param, grad, tensors, group, state["step"], shards, number, saved)
    kept.items[p] = item
    return item


def parameter_and_gradient(p, group):
    """Both as this rank has them, (out, in) if a matrix; the gradient downhill."""
    grad = as_rows(local(p.grad), group)
    return as_rows(local(p), group), -grad if group["maximize"] else grad


def as_rows(tensor, group):
    """A matrix as (out, in): a view of one that is stored (in, out)."""
    return tensor.t() if group["transposed"] and tensor.ndim == 2 else tensor


def is_plain(item):
    """float32, contiguous and whole (parameter, gradient, state); lr a Python number?"""
    tensors = (item.param, item.grad, *item.state.values())
    plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    return plain and item.shards is None and not torch.is_tensor(item.group["lr"])


# ---------------------------------------------------------------------- batches


def update_in_batches(optimizer, items, each=STACK_EACH, together=STACK_TOTAL):
    """Move every item by the optimizer's `direction`; tensors of up to `each` numbers stacked, as
    many as have `together` numbers.

    Of tensors whose rows are on several ranks many go together: sharded/exchange.py.
    """
    spread = [item for item in items if item.shards]
    for batch in batches([i for i in items if not i.shards], optimizer.defaults, each, together):
        if batch[0].param.numel():
            run_alone(update_run(optimizer, batch))
    for portion in in_portions(spread):
        run_sums([update_run(optimizer, [item]) for item in portion], portion[0].shards)


def batches(items, options, each=STACK_EACH, together=STACK_TOTAL):
    """Lists of items to update together: same shape, dtypes, device, step, hyperparameters.

    options: names of the hyperparameters. Tensors of more than `each` numbers stay alone, and a
    stack has at most `together`, or one tensor.
    """
    stacks, keys = {}, {}
    shared = [name for name in options if name not in VARYING]
    for item in items:
        group, shape = item.group, item.param.shape
        stackable = group["foreach"] and item.param.numel() <= each
        if not stackable or torch.is_tensor(group["lr"]):
            yield [item]
            continue
        if id(group) not in keys:
            keys[id(group)] = repr([group.get(name) for name in shared])
        p, g = item.param, item.grad
        key = (shape, p.dtype, g.dtype, p.device, item.step, keys[id(group)])
        stacks.setdefault(key, []).append(item)
    for alike in stacks.values():
        size = max(1, together // max(1, alike[0].param.numel()))
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def update_run(optimizer, items):
    """Move N equally shaped tensors: stack, ask for the direction, write back. A generator, which
    asks as `direction` does (sharded/exchange.py)."""
    first = items[0]

    def generator():
        return rounding_generator(optimizer.kept.generators, first)

    batch = Batch(
        grad=stack([i.grad for i in items]).to(compute_dtype(first.param)),
        state={name: stack([i.state[name] for i in items]) for name in first.state},
        group=first.group,
        schedule=optimizer.schedule(first.group, first.step),
        params=[i.param for i in items],
        step=first.step,
        shards=first.shards,
        generator=generator,
    )
    update, scale = yield from as_run(optimizer.direction(batch))
    if len(items) > 1:  # a stack is a copy; a single tensor was updated in place
        for name in first.state:  # no name for the copies: they would live on
            torch._foreach_copy_([i.state[name] for i in items], list(batch.state[name].unbind(0)))
    if first.group["update_clip"] is not None:
        update, scale = update if scale is None else update * scale, None
        update = yield from clip_update(update, first.group["update_clip"], first.shards)
    del batch  # gradients in float32, copies of a stack's states: not needed any more
    if scale is not None and not shifts(items):
        update, scale = update * scale, None
    write(items, update, scale, generator)


def as_run(direction):
    """A direction that needs no other ranks is a pair, and not a generator: it may be either."""
    return (yield from direction) if hasattr(direction, "send") else direction


WIDE = (torch.float32, torch.float64)


def shifts(items):
    """Is it one tensor whose numbers `shift` moves where they are?"""
    param, lr = items[0].param, items[0].group["lr"]
    alone = len(items) == 1 and param.dtype in WIDE
    return alone and not torch.is_tensor(lr) and param.is_contiguous()


def write(items, update, scale, generator):
    """p <- (1 - lr * weight_decay) p - lr * scale * update for every item: see `direction`.

    scale: None, unless the items are one that `shifts`."""
    params = [i.param for i in items]
    rates = [i.group["lr"] for i in items]
    decays = [1 - i.group["lr"] * i.group["weight_decay"] for i in items]
    target, dtype = params, params[0].dtype
    if shifts(items):
        scale = None if scale is None else scale[0]
        return shift(params[0], update[0], scale, decays[0], rates[0])
    update = update.view(len(items), *params[0].shape)
    if dtype not in WIDE:
        target = [p.to(torch.float32) for p in params]
    updates = list(update.unbind(0))
    if torch.is_tensor(rates[0]):  # stays on its device: nothing waits
        target[0].mul_(decays[0]).sub_(updates[0] * rates[0])
    else:
        if any(d != 1 for d in decays):
            torch._foreach_mul_(target, decays)
        if all(rate == rates[0] for rate in rates):
            torch._foreach_add_(target, updates, alpha=-rates[0])
        else:
            torch._foreach_add_(target, torch._foreach_mul(updates, [-r for r in rates]))
    if target is not params:
        rounds = dtype == torch.bfloat16 and items[0].group["stochastic_rounding"]
        for param, value in zip(params, target):
            param.copy_(round_to_bfloat16(value, generator()) if rounds else value)


def rounding_generator(generators, item):
    """The generator of this step's rounding on the item's device; `generators` keeps it.

    Seeded by the step count: a resumed run rounds as the uninterrupted one would, every rank
    of a data-parallel run rounds alike (of a sharded one each its own rows), and torch's global
    generators are left alone.
    """
    device = item.param.device
    if device not in generators:
        rank = item.number // RANK_STRIDE
        seed = 0x5EED + item.step + (rank << 32)
        generators[device] = torch.Generator(device).manual_seed(seed)
    return generators[device]
