"""From what there is to runs that fit: candidates, and the choice among them.

A candidate changes how a step is computed (tiles, layers computed again, the host), how it is cut
(micro-batches), or what is kept (optimizer, dtype of weights, updates inside backward). All of them
are tried; of each way the largest micro-batch that fits. They are ordered by predicted time, where
a change of what is learned (optimizer, weights' dtype) has to buy a twentieth of the time, and one
of how it is computed a tenth: among equals the one that gives up least comes first.
"""

import functools
import itertools
import math
from dataclasses import dataclass, field, replace

from leangpt.attention.tile_sizes import default_chunk
from leangpt.memory.formulas import host_bytes, moments
from leangpt.memory.given_up import given_up, mean_loss_difference
from leangpt.memory.run import Run
from leangpt.memory.speed import Rates, seconds
from leangpt.memory.update import momentum_bits
from leangpt.optim import VARIANTS
from leangpt.optim.momentum import BLOCK

WORTH = 1.05  # times faster that a plan must be for each change of what is learned
ALIKE = 1.03  # of two times the larger over the smaller, that nobody would choose by
WORTH_OF_A_TRADE = 1.1  # likewise for each way to compute more: smaller micro-batches come first
RESERVE = {"cpu": 0.02, "cuda": 0.05}  # of the memory, left free: see Plan.left
LEAST_RESERVE = {"cpu": 0, "cuda": 384 * 10**6}  # bytes: its allocator has pages of 20 MB
CONTEXT = 600 * 10**6  # bytes that CUDA takes for itself and no allocator counts: an allowance
SHOWN = 5
CHECKPOINTS = ("checkpoint_layers", "checkpoint_first", "offload")


@dataclass(frozen=True)
class Budget:
    """What there is: bytes on the device, bytes of host memory (None: no limit known)."""

    memory: int
    host: int | None = None

    def usable(self, device_type: str) -> int:
        """Bytes that a plan may fill."""
        kind = "cuda" if device_type == "cuda" else "cpu"
        return int(min(self.memory * (1 - RESERVE[kind]), self.memory - LEAST_RESERVE[kind]))


def memory_for(size: float, device_type: str) -> int:
    """The least memory of a device that a plan of `size` bytes may be made for."""
    kind = "cuda" if device_type == "cuda" else "cpu"
    return math.ceil(max(size / (1 - RESERVE[kind]), size + LEAST_RESERVE[kind]))


@dataclass(frozen=True)
class Plan:
    """A run that fits, what its memory is made of, and what it costs."""

    run: Run
    settings: dict  # of train.py, those that the plan decides: its flags
    moment: str  # when in a step memory is fullest
    parts: dict[str, int]  # bytes of each part then (formulas.PARTS)
    host: int  # bytes of pinned host memory
    seconds: float  # of a step
    measured: bool  # are `seconds` from this machine's rates, or only good for comparing?
    gives_up: tuple[str, ...]
    left: int  # bytes of the budget that stay free

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.parts.values())

    @property
    def flags(self) -> str:
        """As train.py takes them."""
        return " ".join(f"--{name}={value}" for name, value in self.settings.items())


@dataclass(frozen=True)
class Wish:
    """What is to be trained. asked: as the user wrote it; fixed: settings not to be changed; most:
    tokens that a sequence may have, of a model whose positions or window end."""

    asked: Run
    fixed: frozenset[str] = field(default_factory=frozenset)
    rates: Rates | None = None
    most: int = 1 << 27
    parallel: tuple[str, ...] = ("ddp",)  # ways to share a run of several processes that may be


def predict(run: Run, wish: Wish, budget: Budget) -> Plan:
    """The Plan of one run, whether it fits or not."""
    found = moments(run)
    moment = max(found, key=lambda name: sum(found[name].values()))
    parts = found[moment]
    if run.device_type == "cuda":
        parts = parts | {"context": CONTEXT}
    return Plan(
        run,
        flags_of(run, wish.asked),
        moment,
        parts,
        host_bytes(run),
        seconds(run, wish.rates),
        wish.rates is not None and wish.rates.measured,
        given_up(run, wish.asked),
        budget.memory - sum(parts.values()),
    )


def fits(run: Run, budget: Budget) -> bool:
    """Does its fullest moment leave the reserve free, and the host have room?"""
    if budget.host is not None and host_bytes(run) > budget.host:
        return False
    return peak_of(run) <= budget.usable(run.device_type)


def peak_of(run: Run) -> int:
    """Bytes at a run's fullest moment, CUDA's own among them."""
    most = max(sum(parts.values()) for parts in moments(run).values())
    return most + CONTEXT * (run.device_type == "cuda")


def fastest(wish: Wish, budget: Budget, most: int = SHOWN) -> list[Plan]:
    """At most `most` plans that fit, the one to take first; [] where nothing fits.

    One for each optimizer and dtype of weights: its best. Of those whose times are alike the one of
    the lowest measured loss comes first.
    """
    best = {}
    for way in ways(wish):
        found = largest_micro_batch(way, wish, budget)
        if found is None:
            continue
        key = found.variant, found.param_bytes
        if key in best and cost_of(with_checkpoints(found, 1), wish) >= best[key][0]:
            continue  # at its best
        found = fewest_checkpoints(found, wish, budget)
        cost = cost_of(found, wish)
        if key not in best or cost < best[key][0]:
            best[key] = cost, found

    def rank(pair):
        cost, run = pair
        nats = 0.0 if run.variant == wish.asked.variant else mean_loss_difference(run, wish.asked)
        return round(math.log(cost) / math.log(ALIKE)), nats, cost

    ranked = sorted(best.values(), key=rank)[:most]
    return [predict(run, wish, budget) for _, run in ranked]


def cost_of(run: Run, wish: Wish) -> float:
    """Seconds of a step, and what each change and each trade has to be worth."""
    cost = seconds(run, wish.rates) * WORTH ** changes(run, wish.asked)
    gathers = run.shares > 1 and wish.asked.shares == 1
    return cost * WORTH_OF_A_TRADE ** (trades(run.config) + gathers)


def changes(run: Run, asked: Run) -> int:
    """How many things differ that change what is learned."""
    return (
        (run.variant != asked.variant)
        + (run.param_bytes != asked.param_bytes)
        + (run.fused != asked.fused)
        + (run.gradient_bits != asked.gradient_bits)
    )


def trades(config) -> int:
    """How many ways of computing more, or of using the host, a configuration goes."""
    tiled = bool(config.q_chunk or config.checkpoint_layers)
    return tiled + config.policy.recomputes + config.offload


def ways(wish: Wish):
    """Every way to keep and to compute, as Runs of the asked micro-batch."""
    for kept in ways_to_keep(wish):
        for config in ways_to_compute(kept, wish.fixed):
            yield replace(kept, config=config)


def ways_to_keep(wish: Wish):
    """Optimizers, dtypes of weights, what becomes of gradients; as asked first."""
    asked, fixed = wish.asked, wish.fixed
    variants, sizes = [asked.variant], [asked.param_bytes]
    modes = [asked.parallel, *(mode for mode in wish.parallel if mode != asked.parallel)]
    modes = modes if asked.processes > 1 else [asked.parallel]
    if "optimizer_variant" not in fixed:
        variants += [name for name in VARIANTS if name != asked.variant]
    if not {"param_dtype", "dtype"} & fixed and asked.stream_bytes == 2 and asked.param_bytes == 4:
        sizes.append(2)
    free = "optimizer_options" not in fixed and not asked.options
    for mode, variant, size in itertools.product(modes, variants, sizes):
        gradients = [{}]
        if free and (asked.processes == 1 or mode == "fsdp"):
            gradients += [{"fused_backward": True}]
        if free and asked.processes == 1 and asked.batch_size * asked.micro_batches > 1:
            gradients += [{"gradient_bits": 8}]
        for freed in gradients:
            if variant == "adam" and (size == 2 or freed):
                continue
            options = dict(asked.options) if variant == asked.variant else {}
            run = replace(
                asked, parallel=mode, variant=variant, param_bytes=size, options=options | freed
            )
            if shareable(run):
                yield run


def shareable(run: Run) -> bool:
    """Can its processes share it so? Updates inside backward need shares of weights, and a momentum
    in few bits rows of whole blocks (parallel/engine.py)."""
    if run.processes == 1:
        return True
    if run.shares == 1:
        return not run.fused
    return not any(
        momentum_bits(t) in (8, 4) and math.prod(t.shape[1:]) % BLOCK
        for t in run.tensors
        if len(t.shape) > 1
    )


def ways_to_compute(run: Run, fixed) -> list:
    """Configurations: as asked, then each slower and smaller than the one before."""
    config, settings = run.config, ("attention_policy", "q_chunk", *CHECKPOINTS)
    dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
    if set(settings) & fixed or dropout > 0:  # which tiles cannot replay
        return [config]
    off = dict(checkpoint_layers=False, checkpoint_first=None, offload=False)
    whole = replace(config, k_chunk=None, **off)
    tile = default_chunk(config, run.device_type)
    rows = [n for n in (tile, 4096, 1024, 512) if n <= tile]
    found = [config, replace(whole, q_chunk=None), replace(whole, q_chunk=tile)]
    leaner = config.policy.leaner or config.attention_policy
    lean = replace(whole, attention_policy=leaner)
    found += [replace(lean, q_chunk=n) for n in rows]
    found += [replace(whole, checkpoint_layers=True, q_chunk=None)]
    found += [replace(lean, q_chunk=n, checkpoint_layers=True) for n in rows]
    if run.device_type == "cuda":
        found += [replace(lean, q_chunk=n, checkpoint_layers=True, offload=True) for n in rows]
    unique = []
    for candidate in found:
        if candidate not in unique:
            unique.append(candidate)
    return unique


def largest_micro_batch(run: Run, wish: Wish, budget: Budget) -> Run | None:
    """The run with the largest micro-batch that fits, its sequences an iteration unchanged."""
    sequences = run.batch_size * run.micro_batches
    factors = divisors(run.batch_size), divisors(run.micro_batches)
    sizes = sorted({first * second for first, second in itertools.product(*factors)})
    if {"batch_size", "gradient_accumulation_steps"} & wish.fixed:
        sizes = [run.batch_size]
    if run.fused:
        sizes = [sequences] if sequences in sizes else []
    low, high = 0, len(sizes)  # of the sizes the first `low` fit, those from `high` on do not
    while low < high:
        middle = (low + high + 1) // 2
        size = sizes[middle - 1]
        if fits(replace(run, batch_size=size, micro_batches=sequences // size), budget):
            low = middle
        else:
            high = middle - 1
    if not low:
        return None
    size = sizes[low - 1]
    return replace(run, batch_size=size, micro_batches=sequences // size)


def fewest_checkpoints(run: Run, wish: Wish, budget: Budget) -> Run:
    """A run that fits and checkpoints all its layers: with as few checkpointed as still fit."""
    L = run.config.n_layer
    if not run.config.checkpoint_layers or set(CHECKPOINTS) & wish.fixed:
        return run
    low, high = 1, L  # `high` layers fit
    while low < high:
        middle = (low + high) // 2
        if fits(with_checkpoints(run, middle), budget):
            high = middle
        else:
            low = middle + 1
    return with_checkpoints(run, high)


def with_checkpoints(run: Run, layers: int) -> Run:
    """The run with its first `layers` layers checkpointed, where it checkpoints any."""
    if not run.config.checkpoint_layers or layers == run.config.n_layer:
        return run
    return replace(run, config=replace(run.config, checkpoint_first=layers))


@functools.cache
def divisors(number: int) -> list[int]:
    """All of them, in square root time: an iteration may have billions of sequences."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def flags_of(run: Run, asked: Run) -> dict:
    """train.py's settings that differ from those asked for, micro-batches always among them."""
    c, before = run.config, asked.config
    flags = {
        "batch_size": run.batch_size,
        "gradient_accumulation_steps": run.micro_batches * run.data_parallel,
    }
    if run.processes > 1:
        flags["parallel"] = run.parallel
    if run.context_parallel > 1:
        flags["context_parallel"] = run.context_parallel
    if run.length != asked.length:
        flags["block_size"] = run.length
    for name in ("n_layer", "n_head", "n_embd"):
        if getattr(c, name) != getattr(before, name):
            flags[name] = getattr(c, name)
    for name in ("attention_policy", "q_chunk", "k_chunk", *CHECKPOINTS):
        if getattr(c, name) != getattr(before, name):
            flags[name] = getattr(c, name)
    if before.policy.grouped and c.attention_policy != before.attention_policy:
        flags["n_kv_head"] = c.kv_heads
    if run.variant != asked.variant:
        flags["optimizer_variant"] = run.variant
    if run.param_bytes != asked.param_bytes:
        flags["param_dtype"] = "bfloat16" if run.param_bytes == 2 else "float32"
    if run.options != asked.options:
        flags["optimizer_options"] = ",".join(f"{k}={v}" for k, v in run.options.items())
    return flags


def leanest(wish: Wish, budget: Budget) -> Plan:
    """The plan that takes least, fitting or not: the floor of what is asked."""
    plans = []
    for way in ways(wish):
        sequences = way.batch_size * way.micro_batches
        size = sequences if way.fused else 1
        if {"batch_size", "gradient_accumulation_steps"} & wish.fixed:
            size = way.batch_size
        if way.fused and size != sequences:
            continue
        run = replace(way, batch_size=size, micro_batches=sequences // size)
        plans.append((peak_of(run), len(plans), run))
    return predict(min(plans)[2], wish, budget)
