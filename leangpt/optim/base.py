"""What AdamSN, Adafactor and MuonSN share: one `torch.optim.Optimizer` whose subclasses only say
in which *direction* a batch of equally shaped tensors moves.

    p <- (1 - lr * weight_decay) * p - lr * direction(gradient, state)          (decoupled decay)

Here is torch's side of it: groups, steps, states that are saved and loaded. How gradients become
batches and updates become weights: optim/batches.py.
"""

import math
import warnings

import torch

from leangpt.optim.batches import Kept, as_rows, make_item, update_in_batches
from leangpt.optim.momentum import BLOCK, FORMAT, MOMENTUM_BITS, from_format_1
from leangpt.optim.sharded.rows import is_sharded, local
from leangpt.system.errors import UserError


class MemoryOptimizer(torch.optim.Optimizer):
    """Base of the optimizers here. A subclass defines `new_state`, `schedule` and `direction`.

    kept: what is remembered for speed alone. strategy: when weights are updated, AfterBackward
    unless fuse_into_backward was called.
    """

    def __init__(self, params, defaults, **common):
        unknown = set(common) - set(COMMON)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        self.kept = Kept()
        self.strategy = AfterBackward()
        # how codes of a momentum are to be read: momentum.py
        super().__init__(params, {"momentum_format": FORMAT} | defaults | COMMON | common)

    # ------------------------------------------------------------------ for subclasses to define

    def new_state(self, tensor, group, shards=None):
        """State tensors (dict name -> tensor) for one local parameter tensor, before a step."""
        raise NotImplementedError

    def spans_rows(self, name, tensor, group, shards):
        """Is state `name` a statistic over all rows, so that every rank holds it whole?"""
        return False

    def needs_ranks(self, tensor, group, shards):
        """Does `direction` ask for what other ranks' rows of a sharded tensor hold?"""
        return group["update_clip"] is not None

    def schedule(self, group, step):
        """The numbers that depend on the step count (1 at the first update) alone: a tuple."""
        raise NotImplementedError

    def direction(self, batch):
        """The update of a Batch, before lr, in two factors: (update, scale).

        update: N tensors' numbers as (N, *view), not to be written to by the caller; scale: None or
        broadcasting against it, such as one number per row. The product is never formed if it need
        not be. One that needs the rows of all ranks is a generator: sharded/exchange.py.
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
        """As torch's. Raises UserError for hyperparameters without meaning; adds nothing then."""
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
        self.kept.generators.clear()
        return self.strategy.step(self, closure)

    def zero_grad(self, set_to_none=True):
        """As torch's; gradients that hooks have taken and no step has used are dropped as well."""
        super().zero_grad(set_to_none)
        self.strategy.forget()

    def update_all(self, work):
        """Update [(parameter, its group)]; no gradient is held on to afterwards."""
        for p, _ in work:
            self.refuse_sparse(p)
        items = [make_item(self, p, group) for p, group in work]
        self.update(items)
        for item in items:
            item.grad = None

    def refuse_sparse(self, p):
        """Raise UserError where the gradient of `p` is sparse."""
        if p.grad.is_sparse:
            name = type(self).__name__
            raise UserError(f"{name} needs dense gradients: build the embedding with sparse=False")

    def update(self, items):
        """Move every Item; a subclass first hands to its kernels what they take."""
        update_in_batches(self, items)

    def state_dict(self):
        """As torch's; beside it `gradient_norm`, where updates inside backward clip by it.

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
        return super().state_dict() | self.strategy.state_dict()

    def load_state_dict(self, state_dict):
        """As torch's, but state keeps the dtype it was saved in (torch casts it to the
        parameter's, which would turn float32 statistics of bfloat16 weights into bfloat16).

        Raises UserError for the state of another optimizer, of another grouping, or of tensors
        that this class would lay out otherwise; nothing is loaded then.
        """
        check_layout(state_dict)
        groups = [self.as_saved_today(group) for group in state_dict["param_groups"]]
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise UserError(
                "this optimizer state does not fit the model: it has groups of "
                f"{', '.join(map(str, sizes))} parameters"
            )
        states = []
        for group, own in zip(groups, self.param_groups):
            try:
                self.check_group(group)
            except (TypeError, KeyError) as error:  # a text where a number should be, and the like
                raise UserError(f"this optimizer state has an impossible option: {error}") from None
            for saved_id, p in zip(group["params"], own["params"]):
                state = state_dict["state"].get(saved_id, {})
                self.check_state(p, group, state)
                states.append((p, state))
        super().load_state_dict(state_dict | {"param_groups": groups})
        self.strategy.load_state_dict(state_dict)
        for p, state in states:
            for name, value in state.items():
                if torch.is_tensor(value):
                    value = value.detach().clone().to(p.device)
                self.state[p][name] = value
        for group in self.param_groups:
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

    def as_saved_today(self, group):
        """A saved group with the options that came later, and without those that are gone."""
        group = {name: ADDED_LATER[name] for name in self.defaults if name in ADDED_LATER} | group
        missing = self.defaults.keys() - group.keys() - {"differentiable"}  # torch's, as it loads
        if missing:
            raise UserError(
                f"this optimizer state was not saved by {type(self).__name__} (it lacks "
                f"{', '.join(sorted(missing))}): resume with the optimizer it was saved by"
            )
        for name in GONE:
            if group.pop(name, False) and GONE[name]:
                raise UserError(
                    f"this optimizer state was saved with {name}=True, which is no longer there"
                )
        return group

    def check_state(self, p, group, state, wanted=None):
        """Raise UserError where a saved state is not laid out as this class lays out its own, or
        as `wanted` (dict name -> tensor) is."""
        if not state or is_sharded(p):
            return
        if type(state.get("step")) is not int or not 0 < state["step"] < 2**31:
            raise UserError("this optimizer state does not fit: it counts no steps")
        wanted = self.planned_state(p, group) if wanted is None else wanted
        found = {name: value for name, value in state.items() if torch.is_tensor(value)}
        for name in wanted | found:
            kinds = [
                f"{str(tensors[name].dtype).removeprefix('torch.')} {tuple(tensors[name].shape)}"
                if name in tensors
                else "nothing"
                for tensors in (wanted, found)
            ]
            if kinds[0] != kinds[1]:
                raise UserError(
                    f"this optimizer state does not fit: {name} of a weight {tuple(p.shape)} "
                    f"should be {kinds[0]}, and is {kinds[1]}"
                )

    def planned_state(self, p, group):
        """The state of parameter `p`, as tensors on the meta device; of a shard, this rank's."""
        return self.new_state(as_rows(local(p).detach().to("meta"), group), group)

    def __setstate__(self, state):  # pickle and deepcopy; load_state_dict too
        super().__setstate__(state)
        self.strategy = self.__dict__.get("strategy", AfterBackward())  # hooks stay on
        self.kept = Kept()


class AfterBackward:
    """When weights are updated: in step(), all at once. The other way is FusedBackward's."""

    def step(self, optimizer, closure):
        """One step; the loss that `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = optimizer.param_groups
        optimizer.update_all([(p, g) for g in groups for p in g["params"] if p.grad is not None])
        return loss

    def forget(self):
        """Drop gradients kept elsewhere than in p.grad: there are none."""

    def state_dict(self):
        """What a checkpoint keeps beside states and groups: nothing."""
        return {}

    def load_state_dict(self, state_dict):
        """Take back what `state_dict` gave."""


# ---------------------------------------------------------------------- small pieces


COMMON = dict(  # the options every optimizer here has
    maximize=False, foreach=True, stochastic_rounding=True, update_clip=None, transposed=False
)
# options that older states lack, and what they meant
ADDED_LATER = dict(factored=True, column_norm=False, nu1=1.0, transposed=False, momentum_format=1)
# options that older states have: did they change what the state means?
GONE = dict(compile=False, head_dim=False, skip_nonfinite=False, per_head=True)
COMMON_HELP = """
    Parameters have any shape and real dtype, gradients are dense. Statistics and arithmetic are
    float32 (float64 for float64). lr and weight_decay may be tensors of one element.

    maximize             ascend instead
    foreach              stack small tensors of one shape and use multi-tensor kernels;
                         False is the plain loop, with the same result up to rounding
    stochastic_rounding  round bfloat16 parameters without bias instead of to nearest
    update_clip          largest root mean square of one tensor's update (before lr); None: no clip
    transposed           of groups: matrices are stored (in, out), as Hugging Face's Conv1D has
                         them, and updated as the (out, in) of nn.Linear would be
"""


def check_layout(state_dict):
    """Raise UserError where this is no optimizer's state_dict: an entry of plain values and dense
    tensors for parameters by number, and groups of those numbers."""
    groups, entries = (
        state_dict.get(key) if isinstance(state_dict, dict) else None
        for key in ("param_groups", "state")
    )
    if not isinstance(groups, list) or not isinstance(entries, dict):
        raise UserError("this is no optimizer's state: it lacks state or param_groups")
    numbers = []
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list | tuple):
            raise UserError("this optimizer state is damaged: a group has no params")
        numbers += group["params"]
    if not all(type(number) is int for number in numbers) or len({*numbers}) != len(numbers):
        raise UserError("this optimizer state is damaged: its parameters are not numbered")
    for entry in entries.values():
        if not isinstance(entry, dict):
            raise UserError(f"this optimizer state is damaged: an entry is {entry!r:.50}")
        for name, value in entry.items():
            if torch.is_tensor(value) and (value.layout != torch.strided or value.is_quantized):
                raise UserError(f"this optimizer state does not fit: {name} is no dense tensor")


def check_number(group, name, low):
    """Raise UserError unless group[name], if there is one, is finite and at least `low`."""
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
