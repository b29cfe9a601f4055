"""A run before it starts: the memory it will take, whether it fits, and a plan where it is asked
for.

The planner (leangpt/memory) knows Runs; here a run's settings become one, and a plan's flags become
settings. Of several processes the fullest is meant.
"""

import os
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from leangpt.attention.tile_sizes import tile_sizes
from leangpt.memory.goals import plans, refusal, shared_ways, with_fewest_changes
from leangpt.memory.run import Run
from leangpt.memory.search import CONTEXT, Budget, Plan, Wish, fastest, fits, predict, shareable
from leangpt.memory.units import in_words, parse_bytes
from leangpt.system.errors import UserError
from leangpt.system.host_memory import available_memory, total_memory
from leangpt.text.folder import GPT2_VOCAB_SIZE
from leangpt.training.settings import MOST_TOKENS
from leangpt.weights.shape import pretrained_shape, shaped

IGNORE = "ignore"
OF_THE_OPTIMIZER = ("optimizer_variant", "optimizer_options", "param_dtype")
OF_THE_RATES = ("learning_rate", "embedding_lr", "min_lr")  # which were chosen for one variant
OF_THE_BATCH = ("batch_size", "gradient_accumulation_steps")


def run_config(config_class, settings, given, vocab_size, checkpoint=None):
    """The configuration of the model that a run will have, from what decides it alone: nothing is
    allocated, and of a published model config.json is read.

    config_class: GPTConfig. given: names that a command or config file set. vocab_size: of the
    data. Raises UserError.
    """
    free = {name: getattr(settings, name) for name in config_class.FREE}
    if settings.init_from == "scratch":
        names = config_class.__dataclass_fields__
        shape = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
        if vocab_size == GPT2_VOCAB_SIZE:  # up to a multiple of 64, as nanoGPT: faster products
            vocab_size = 50304
        return config_class(**shape | {"vocab_size": vocab_size})
    asked = {"block_size": settings.block_size} if "block_size" in given else {}
    if settings.init_from == "resume":
        config = config_class.from_dict({**checkpoint["model_args"], **free})
        if asked and config.position != "learned":  # reaches as far as it is asked to
            asked["block_size"] = max(settings.block_size, config.block_size)
        return replace(config, **asked)
    shape = pretrained_shape(settings.init_from)
    config, block_size = shaped(config_class, shape, settings.init_from, {**free, **asked})
    return replace(config, block_size=block_size)


def wish_of(
    settings, flags, config, options, dtype, device_type, processes=1, rates=None, memory=None
) -> Wish:
    """A Wish: the run that settings describe, and which of them are not to be changed.

    settings: with the block_size that the run adopts (start.adopted_block_size). flags: names that
    the command line itself sets; options: optimizer_options as a dict; dtype: of products. Where a
    learning rate is given it was chosen for an optimizer, which then stays; a run that is
    resumed keeps its optimizer and its batches, and a model that was trained its learned positions.
    """
    # what one process computes, as batches.share_of has it: whole micro-batches, or some rows
    data_parallel = processes // settings.context_parallel
    each, left = divmod(settings.gradient_accumulation_steps, data_parallel)
    sequences = settings.batch_size
    if left:
        each, sequences = settings.gradient_accumulation_steps, -(-sequences // data_parallel)
    modes = shared_ways(settings.parallel)
    if dtype == torch.float16:  # whose gradients shares do not scale
        modes = modes[:1]
    elif options.get("fused_backward"):
        modes = modes[-1:]
    asked = Run(
        config,
        sequences,
        settings.block_size,
        each,
        settings.optimizer_variant,
        options,
        4 if settings.param_dtype == "float32" else 2,
        dtype.itemsize,
        device_type,
        processes,
        modes[0],
        settings.context_parallel,
        memory if device_type == "cuda" else None,
        compiled=device_type == "cuda" if settings.compile is None else settings.compile,
    )
    fixed = set(flags)
    if any(getattr(settings, name) is not None for name in OF_THE_RATES):
        fixed.add("optimizer_variant")
    if dtype == torch.float16:  # gradients are scaled, which neither of the two goes with
        fixed |= {"optimizer_options", "param_dtype"}
    if settings.init_from == "resume":
        fixed |= {*OF_THE_OPTIMIZER, *OF_THE_BATCH}
    if left:  # rows of every micro-batch each: another number of them is another share
        fixed |= set(OF_THE_BATCH)
    reach = [MOST_TOKENS]
    if config.sliding_window:
        reach.append(config.sliding_window)
    if config.position == "learned" and settings.init_from != "scratch":
        reach.append(config.block_size)
    return Wish(asked, frozenset(fixed), rates, min(reach), modes)


@dataclass(frozen=True)
class Fitted:
    """Settings that fit, with the plan they come from, where it could be predicted."""

    settings: object
    plan: Plan | None = None
    at_hand: int | None = None  # bytes
    chosen: bool = False  # were settings changed for it?
    plain: int | None = None  # bytes at the peak of plain blocks, where these are not

    def describe(self) -> str:
        """The predicted peak and its parts, in a line."""
        parts = ", ".join(f"{part} {in_words(n)}" for part, n in largest_parts(self.plan))
        flags = f"{self.plan.flags}: " if self.chosen else ""
        of = "" if self.at_hand is None else f" of {in_words(self.at_hand)}"
        words = f"{flags}{in_words(self.plan.peak)}{of} at its fullest, {self.plan.moment}: {parts}"
        return words if self.plain is None else f"{words}; plain blocks: {in_words(self.plain)}"


def largest_parts(plan, share=0.01):
    """(name, bytes) of a plan's parts that are at least that share of it, the largest first."""
    parts = sorted(plan.parts.items(), key=lambda pair: -pair[1])
    return [(name, size) for name, size in parts if size >= share * plan.peak]


def fit(settings, flags, config, options, runtime, auto=False) -> Fitted:
    """Settings that fit the memory at hand, before anything of their size is allocated.

    With memory=24GB, or auto (attention_policy's), those of the fastest plan. Without, the settings
    as they are. Raises UserError where they do not fit, naming the nearest plan, unless
    memory=ignore. An evaluation alone needs less than any plan says and is not looked at.
    """
    plans_it = auto or settings.memory not in (None, IGNORE)
    several = runtime.world_size > 1
    if settings.eval_only and not plans_it:
        return Fitted(settings)
    if runtime.device_type == "mps":
        if plans_it:
            raise UserError(
                "a plan (memory=..., attention_policy=auto) is not made for device=mps yet: "
                "give the settings themselves"
            )
        return Fitted(settings)
    budget = budget_of(settings.memory, runtime)
    here = (runtime.dtype, runtime.device_type, runtime.world_size)
    total = None
    if runtime.device_type == "cuda":
        total = torch.cuda.get_device_properties(runtime.device).total_memory
    wish = wish_of(settings, flags, config, options, *here, memory=total)
    if plans_it:
        found = plans(wish, budget, "fastest", most=1)[0]
        plain = plain_peak(found.run, wish, budget)
        return Fitted(replace(settings, **found.settings), found, budget.memory, True, plain)
    wish = replace(wish, asked=shared(wish, budget))
    asked = predict(wish.asked, wish, budget)
    if settings.memory != IGNORE and budget.memory and not fits(wish.asked, budget):
        raise UserError(too_large(asked, wish, budget))
    if several:
        settings = replace(settings, parallel=wish.asked.parallel)
    plain = plain_peak(wish.asked, wish, budget)
    return Fitted(settings, asked, budget.memory or None, plain=plain)


def shared(wish, budget) -> Run:
    """The asked run, in the first way to share it that fits; where none does, the last."""
    runs = [replace(wish.asked, parallel=mode) for mode in wish.parallel]
    runs = [run for run in runs if shareable(run)] or [wish.asked]
    fitting = [run for run in runs if not budget.memory or fits(run, budget)]
    return [*fitting, runs[-1]][0]


def plain_peak(run, wish, budget) -> int | None:
    """Bytes at the peak of the same run with plain blocks; None where its blocks are."""
    if tile_sizes(run.config, run.length, run.device_type, training=True) is None:
        return None
    policy = "grouped" if run.config.policy.grouped else "cache"
    whole = dict(q_chunk=None, k_chunk=None, checkpoint_layers=False, offload=False)
    whole |= dict(checkpoint_first=None)
    config = replace(run.config, attention_policy=policy, **whole)
    return predict(replace(run, config=config), wish, budget).peak


def too_large(asked, wish, budget) -> str:
    """One line: what the run would take, and the nearest plan that fits."""
    line = (
        f"this run takes {in_words(asked.peak)} at its fullest ({asked.moment}), of "
        f"{in_words(budget.memory)} at hand"
    )
    return f"{line}{nearest(asked, wish, budget, ' (--memory=ignore starts it as it is)')}"


def nearest(asked, wish, budget, after="") -> str:
    """What fits a budget: the flags of the nearest plan, those that change something, and its peak;
    or why none fits.

    asked: the Plan of what was wished. Flags of the command line stay where that is possible.
    """
    anything = replace(wish, fixed=wish.fixed & {*OF_THE_RATES, *OF_THE_OPTIMIZER})
    for allowed in (wish, anything):
        for fastest_one in fastest(allowed, budget, 1):
            found = with_fewest_changes(fastest_one, wish, budget)
            new = {k: v for k, v in found.settings.items() if asked.settings.get(k) != v}
            flags = " ".join(f"--{name}={value}" for name, value in new.items())
            return f"; {flags} would take {in_words(found.peak)}{after}"
    return f", and {refusal(anything, budget)}"


def budget_of(memory, runtime) -> Budget:
    """The memory that a run may fill; 0 bytes: not known.

    memory: of settings. Raises UserError for more than the device has.
    """
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this host
    host = (available_memory() or 0) // neighbours
    if runtime.device_type == "cuda":
        total = torch.cuda.mem_get_info(runtime.device)[1]
        at_hand = left_on_card(runtime.device)
    else:
        at_hand, total = host, total_memory()
    at_hand, host = least_of_all(runtime, at_hand, host)
    if memory in (None, IGNORE):
        return Budget(at_hand, host or None)
    wanted = parse_bytes(memory)
    if total and wanted > total:
        raise UserError(
            f"memory={memory}: this machine's {runtime.device} has {in_words(total)}; plan.py "
            "plans for others"
        )
    if at_hand and wanted > at_hand:
        raise UserError(
            f"memory={memory}: of this machine's {runtime.device} {in_words(at_hand)} are free "
            "now: give that at most, or end what takes the rest"
        )
    return Budget(wanted, host or None)


def left_on_card(device) -> int:
    """Bytes of a card that are free or this process's own: the allocator's, and CUDA's context."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + CONTEXT


def least_of_all(runtime, *numbers) -> list[int]:
    """Of each number the least that a process of this run has."""
    if runtime.world_size == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, device=runtime.device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor.tolist()


def measured_beside(fitted: Fitted, measured: int) -> str:
    """One line for the log: predicted, measured, and by how much they differ."""
    predicted = fitted.plan.peak - fitted.plan.parts.get("context", 0)
    return (
        f"memory: predicted {in_words(predicted)}, measured {in_words(measured)} "
        f"({predicted / measured - 1:+.1%})"
    )
