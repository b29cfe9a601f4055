"""What AdamSN, Adafactor and MuonSN share: one `torch.optim.Optimizer` whose subclasses only say
in which *direction* a batch of equally shaped tensors moves.

    p <- (1 - lr * weight_decay) * p - lr * direction(gradient, state)          (decoupled decay)

A step collects (parameter, gradient, state) items from every group; stacks the small ones that
share a shape and hyperparameters, whatever their group, so that a hundred little matrices cost the
launches of one (`foreach=True`); takes the large ones one at a time (a copy would cost more than
the launches); and writes the parameters back. Statistics and arithmetic are float32 (float64 for
float64 parameters) whatever the parameter's dtype; bfloat16 parameters are rounded
stochastically. Nothing waits for the device, save the one flag of `skip_nonfinite`.
"""

import math
import warnings
from dataclasses import dataclass

import torch

from leangpt.optim.arithmetic import clip_update, compute_dtype, shift, stack
from leangpt.optim.momentum import BLOCK, FORMAT, MOMENTUM_BITS, from_format_1, round_to_bfloat16
from leangpt.optim.sharding import (
    RowShards,
    all_finite,
    is_sharded,
    local,
    local_state,
    shard_state,
)
from leangpt.optim.step_kernels import Plans
from leangpt.system.errors import UserError

STACK_EACH = 1 << 18  # tensors of at most this many numbers are stacked ...
STACK_TOTAL = 1 << 24  # ... up to this many numbers in one stack
VARYING = {"params", "lr", "initial_lr", "weight_decay", "name"}  # may differ within a stack


@dataclass(slots=True)
class Item:
    """One tensor to update. `param`, `grad` and `state` are local shards, perhaps row slices."""

    param: torch.Tensor
    grad: torch.Tensor
    state: dict  # name -> tensor, without the step count
    group: dict
    step: int  # 1 at the first update
    shards: RowShards | None = None  # how to reduce over the ranks that hold the other rows
    number: int = 0  # the parameter's place among all of the optimizer's


@dataclass(slots=True)
class Batch:
    """N equally shaped tensors on their way through `direction`."""

    grad: torch.Tensor  # (N, *shape) float32 or float64; not to be written to
    state: dict  # name -> (N, ...) tensors, to be updated in place
    group: dict  # the hyperparameters that all N share
    schedule: tuple  # the subclass's numbers of this step: floats; 0-dim tensors when compiled
    params: list  # the N parameters themselves
    step: int = 0  # how many steps they have taken, this one included
    shards: RowShards | None = None
    generator: object = None  # () -> torch.Generator of this step's rounding


class MemoryOptimizer(torch.optim.Optimizer):
    """Base of the optimizers here. A subclass defines `new_state`, `direction`, `check_group`."""

    def __init__(self, params, defaults, **common):
        unknown = set(common) - set(COMMON)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        self.skipped_steps = 0
        self._forget()
        self.fused = None  # low_byte.FusedBackward, once the update runs inside backward
        # how codes of a momentum are to be read: momentum.py
        super().__init__(params, {"momentum_format": FORMAT} | defaults | COMMON | common)

    # ------------------------------------------------------------------ for subclasses to define

    def new_state(self, tensor, group, shards=None):
        """State tensors (dict name -> tensor) for one local parameter tensor, before a step."""
        raise NotImplementedError

    def spans_rows(self, name, tensor, group, shards):
        """Is state `name` a statistic over all rows, so that every rank holds it whole?"""
        return False

    def schedule(self, group, step):
        """The numbers that depend on the step count (1 at the first update) alone: a tuple."""
        raise NotImplementedError

    def direction(self, batch):
        """The update of a Batch, before lr, in two factors: (update, scale).

        update: N tensors' numbers as (N, *view), not to be written to by the caller; scale: None or
        broadcasting against it, such as one number a row. The product is never formed if it need
        not be.
        """
        raise NotImplementedError

    def check_group(self, group):
        """Raise UserError where a group's hyperparameters make no sense."""
        check_number(group, "lr", 0)
        check_number(group, "weight_decay", 0)
        check_number(group, "eps", 0)
        if "betas" in group:
            betas = group["betas"]
            if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
                raise UserError(f"betas must be two numbers in [0, 1), not {betas}")
        if group.get("momentum_bits", 32) not in MOMENTUM_BITS:
            raise UserError(f"momentum_bits must be 32, 16, 8 or 4, not {group['momentum_bits']}")
        if group["update_clip"] is not None:
            check_number(group, "update_clip", 0)

    # ------------------------------------------------------------------ torch.optim.Optimizer

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
            for p in group["params"]:
                if p.is_complex():
                    raise UserError("complex parameters are not supported: split them in two")
        except UserError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. Returns the closure's loss, if any."""
        loss = None
        if closure is not None and self.fused is None:
            with torch.enable_grad():
                loss = closure()
        self._generators.clear()
        if self.fused is not None:
            self.fused.finish_step(self, closure)
            return loss
        work = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p, _ in work:
            self.refuse_sparse(p)
        if self.defaults["skip_nonfinite"] and not all_finite([p.grad for p, _ in work]):
            self.skipped_steps += 1
            return loss
        self.update_all(work)
        return loss

    def update_all(self, work):
        """Update [(parameter, its group)]; no gradient is held on to afterwards."""
        items = [self.make_item(p, group) for p, group in work]
        self.update(items)
        for item in items:
            item.grad = None

    def refuse_sparse(self, p):
        if p.grad.is_sparse:
            name = type(self).__name__
            raise UserError(f"{name} needs dense gradients: build the embedding with sparse=False")

    def state_dict(self):
        """As torch's, and `skipped_steps` beside the state and the groups.

        Raises UserError where the state of sharded weights has pieces that no checkpoint could
        put together again.
        """
        for p, state in self.state.items():
            if is_sharded(p) and any(
                torch.is_tensor(v) and not is_sharded(v) for v in state.values()
            ):
                raise UserError(
                    f"sharded weights of shape {tuple(p.shape)}: momentum in 8 or 4 bits can only "
                    f"be saved where a row is a multiple of {BLOCK} numbers; use momentum_bits=16"
                )
        state = super().state_dict() | {"skipped_steps": self.skipped_steps}
        if self.fused is not None and self.fused.norm is not None:
            state["gradient_norm"] = self.fused.norm
        return state

    def load_state_dict(self, state_dict):
        """As torch's, but state keeps the dtype it was saved in (torch casts it to the
        parameter's, which would turn float32 statistics of bfloat16 weights into bfloat16).

        Raises UserError for the state of another optimizer or of another grouping.
        """
        later = {"differentiable", *ADDED_LATER}  # the first is torch's own
        for group in state_dict["param_groups"]:
            missing = self.defaults.keys() - group.keys() - later
            if missing:
                raise UserError(
                    f"this optimizer state was not saved by {type(self).__name__} (it lacks "
                    f"{', '.join(sorted(missing))}): resume with the optimizer it was saved by"
                )
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise UserError(f"this optimizer state does not fit the model: {error}") from None
        self.skipped_steps = state_dict.get("skipped_steps", 0)
        if self.fused is not None:
            self.fused.norm = state_dict.get("gradient_norm")
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for saved_id, p in zip(saved_ids, params):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if torch.is_tensor(value):
                    value = value.detach().clone().to(p.device)
                self.state[p][name] = value
        for group in self.param_groups:
            for name in self.defaults.keys() & ADDED_LATER.keys():
                group.setdefault(name, ADDED_LATER[name])
            self.check_group(group)
            for p in group["params"]:
                self.check_state(p, group)
            if group["momentum_format"] == 1:
                self._rewrite_momentum(group)

    def _rewrite_momentum(self, group):
        """Codes saved before zero had one of its own become those of today, the values alike."""
        for p in group["params"]:
            state = self.state.get(p, {})
            if "momentum_scale" in state:
                codes, scales = local(state["momentum"]), local(state["momentum_scale"])
                from_format_1(codes, scales, state["step"])
        group["momentum_format"] = FORMAT

    def check_state(self, p, group):
        """Raise UserError where a loaded state is not laid out as this class lays out its own."""
        if not self.state.get(p) or is_sharded(p):
            return
        for name, value in self.new_state(p.detach().to("meta"), group).items():
            found = self.state[p].get(name)
            if found is None or found.shape != value.shape:
                was = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise UserError(
                    f"this optimizer state does not fit: {name} of a weight {tuple(p.shape)} "
                    f"should have shape {tuple(value.shape)}, and the file has {was}"
                )

    def __getstate__(self):  # pickle and deepcopy
        return super().__getstate__() | {"skipped_steps": self.skipped_steps}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.skipped_steps = state.get("skipped_steps", 0)
        self.fused = self.__dict__.get("fused")  # hooks stay on when a state is loaded
        self._forget()

    def _forget(self):
        """Drop whatever is kept between steps for speed alone."""
        self._generators, self._compiled = {}, None
        self._items, self._numbers, self.kernels = {}, {}, Plans()

    # ------------------------------------------------------------------ one step

    def make_item(self, p, group):
        """The item of parameter `p`, its state made if this is its first step, its step counted.

        Kept from step to step while group and state tensors stay what they are.
        """
        state, item = self.state[p], self._items.get(p)
        if item is not None and item.group is group and state:
            if all(state[name] is value for name, value in item.state.items()):
                state["step"] += 1
                item.step = state["step"]
                item.grad = -p.grad if group["maximize"] else p.grad
                return item
        shards = RowShards(p) if is_sharded(p) else None
        if not state:
            state["step"] = 0
            for name, value in self.new_state(local(p), group, shards).items():
                if shards:
                    spans = self.spans_rows(name, local(p), group, shards)
                    value = shard_state(name, value, p, spans)
                state[name] = value
        state["step"] += 1
        tensors = {
            name: local_state(name, value, state) for name, value in state.items() if name != "step"
        }
        grad = local(p.grad)
        grad = -grad if group["maximize"] else grad
        if p not in self._numbers:
            everything = [q for g in self.param_groups for q in g["params"]]
            self._numbers = {q: number for number, q in enumerate(everything)}
        item = Item(local(p), grad, tensors, group, state["step"], shards, self._numbers[p])
        if not shards:
            self._items[p] = item
        return item

    def update(self, items):
        """Update every item: the large ones compiled if so asked, the others batch by batch."""
        if self.defaults["compile"]:
            large = [i for i in items if self.is_plain(i) and i.param.numel() > STACK_EACH]
            if large:
                self.update_compiled(large)
            taken = set(map(id, large))
            items = [i for i in items if id(i) not in taken]
        for batch in self.batches(items):
            self.update_batch(batch)

    def is_plain(self, item):
        """float32, contiguous and whole (parameter, gradient, state); lr a Python number?"""
        tensors = (item.param, item.grad, *item.state.values())
        plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        return plain and item.shards is None and not torch.is_tensor(item.group["lr"])

    def batches(self, items, each=STACK_EACH):
        """Lists of items to update together: same shape, dtypes, device, step, hyperparameters.

        Tensors of more than `each` numbers stay alone.
        """
        stacks, keys = {}, {}
        shared = [name for name in self.defaults if name not in VARYING]
        for item in items:
            group, shape = item.group, item.param.shape
            stackable = group["foreach"] and item.param.numel() <= each
            if not stackable or item.shards or torch.is_tensor(group["lr"]):
                yield [item]  # sharded ones in the order of the parameters, alike on every rank
                continue
            if id(group) not in keys:
                keys[id(group)] = repr([group.get(name) for name in shared])
            p, g = item.param, item.grad
            key = (shape, p.dtype, g.dtype, p.device, item.step, keys[id(group)])
            stacks.setdefault(key, []).append(item)
        for alike in stacks.values():
            size = max(1, STACK_TOTAL // max(1, alike[0].param.numel()))
            for start in range(0, len(alike), size):
                yield alike[start : start + size]

    def update_batch(self, items):
        """Move N equally shaped tensors: stack, ask for the direction, write back."""
        first = items[0]
        if not first.param.numel() and not first.shards:
            return
        batch = Batch(
            grad=stack([i.grad for i in items]).to(compute_dtype(first.param)),
            state={name: stack([i.state[name] for i in items]) for name in first.state},
            group=first.group,
            schedule=self.schedule(first.group, first.step),
            params=[i.param for i in items],
            step=first.step,
            shards=first.shards,
            generator=lambda: self.generator(first),
        )
        update, scale = self.direction(batch)
        if len(items) > 1:  # a stack is a copy; a single tensor was updated in place
            for name, value in batch.state.items():
                torch._foreach_copy_([i.state[name] for i in items], list(value.unbind(0)))
        if first.group["update_clip"] is not None:
            update = update if scale is None else update * scale
            update, scale = clip_update(update, first.group["update_clip"], first.shards), None
        self.write(items, update, scale)

    def update_compiled(self, items):
        """The loop over `items` as one graph: torch.compile fuses each tensor's passes."""
        if self._compiled is None:
            self._compiled = torch.compile(self.plain_loop, dynamic=False, fullgraph=True)
        scalars = {}  # number -> 0-dim tensor, so that a new rate or step is no new graph

        def tensor(number):
            if number not in scalars:
                scalars[number] = torch.tensor(number, dtype=torch.float32)
            return scalars[number]

        self._compiled(
            [i.param for i in items],
            [i.grad for i in items],
            [i.state for i in items],
            [{k: v for k, v in i.group.items() if k not in VARYING} for i in items],
            [tuple(map(tensor, self.schedule(i.group, i.step))) for i in items],
            [tensor(i.group["lr"]) for i in items],
            [tensor(1 - i.group["lr"] * i.group["weight_decay"]) for i in items],
        )

    def plain_loop(self, params, grads, states, groups, schedules, rates, decays):
        """What a step does to plain float32 tensors, one after the other."""
        columns = zip(params, grads, states, groups, schedules, rates, decays)
        for param, grad, state, group, schedule, rate, decay in columns:
            state = {name: value.unsqueeze(0) for name, value in state.items()}
            batch = Batch(grad.unsqueeze(0), state, group, schedule, [param])
            update, scale = self.direction(batch)
            update = update if scale is None else update * scale
            if group["update_clip"] is not None:
                update = clip_update(update, group["update_clip"])
            param.copy_(param * decay - update.view(param.shape) * rate)

    def write(self, items, update, scale):
        """p <- (1 - lr * weight_decay) p - lr * scale * update for every item: see `direction`."""
        params = [i.param for i in items]
        rates = [i.group["lr"] for i in items]
        decays = [1 - i.group["lr"] * i.group["weight_decay"] for i in items]
        target, dtype = params, params[0].dtype
        simple = dtype in (torch.float32, torch.float64) and not torch.is_tensor(rates[0])
        if len(items) == 1 and simple and params[0].is_contiguous():
            scale = None if scale is None else scale[0]
            return shift(params[0], update[0], scale, decays[0], rates[0])
        update = update if scale is None else update * scale
        update = update.view(len(items), *params[0].shape)
        if dtype not in (torch.float32, torch.float64):
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
            if dtype == torch.bfloat16 and items[0].group["stochastic_rounding"]:
                generator = self.generator(items[0])
                target = [round_to_bfloat16(t, generator) for t in target]
            torch._foreach_copy_(params, target)

    def generator(self, item):
        """The generator of this step's rounding on the item's device.

        Seeded by the step count: a resumed run rounds as the uninterrupted one would, every rank
        of a data-parallel run rounds alike, and torch's global generators are left alone.
        """
        device = item.param.device
        if device not in self._generators:
            generator = torch.Generator(device)
            self._generators[device] = generator.manual_seed(0x5EED + item.step)
        return self._generators[device]


# ---------------------------------------------------------------------- small pieces


COMMON = dict(  # the options every optimizer here has
    maximize=False,
    foreach=True,
    compile=False,
    stochastic_rounding=True,
    update_clip=None,
    skip_nonfinite=False,
)
# options that older states lack, and what they meant
ADDED_LATER = dict(factored=True, column_norm=False, nu1=1.0, momentum_format=1)
COMMON_HELP = """
    maximize             ascend instead
    foreach              stack small tensors of one shape and use multi-tensor kernels;
                         False is the plain loop, with the same result up to rounding
    compile              fuse the update of large float32 tensors with torch.compile: fewest passes
                         over memory, for tens of seconds of compilation at the first step
    stochastic_rounding  round bfloat16 parameters without bias instead of to nearest
    update_clip          largest root mean square of one tensor's update (before lr); None: no clip
    skip_nonfinite       leave everything as it is when any gradient is inf or nan, and count it in
                         `skipped_steps`; costs one wait for the device a step
"""


def check_number(group, name, low):
    value = group.get(name, low)
    if torch.is_tensor(value):
        if value.numel() != 1:
            raise UserError(f"a tensor {name} must have one element, not {value.numel()}")
        return
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
        raise UserError(f"{name} must be a finite number of at least {low}, not {value!r}")


_said = set()


def say_once(message):
    """Warn about a choice made for the user, once a process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
