"""From what there is to runs that fit: candidates, the choice among them, and goals beyond fitting.

A candidate changes how a step is computed (tiles, layers computed again, the host), how it is cut
(micro-batches), or what is kept (optimizer, dtype of weights, updates inside backward). All of them
are tried; of each way the largest micro-batch that fits. They are ordered by predicted time, where
a change of what is learned (optimizer, weights' dtype) has to buy a twentieth of the time: among
equals the one that gives up least comes first.
"""

from dataclasses import dataclass, field, replace

from leangpt.attention.tile_sizes import default_chunk
from leangpt.memory.given_up import given_up
from leangpt.memory.formulas import host_bytes, moments
from leangpt.memory.run import Run
from leangpt.memory.speed import Rates, seconds
from leangpt.memory.units import in_words
from leangpt.optim import VARIANTS
from leangpt.system.errors import UserError

WORTH = 1.05  # times faster that a plan must be for each change of what is learned
RESERVE = {"cpu": 0.02, "cuda": 0.05}  # of the memory, left free: see Plan.left
SHOWN = 5


@dataclass(frozen=True)
class Budget:
    """What there is: bytes on the device, bytes of host memory (None: no limit known)."""

    memory: int
    host: int | None = None

    def usable(self, device_type: str) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory * (1 - RESERVE["cuda" if device_type == "cuda" else "cpu"]))


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
    """What is to be trained. asked: as the user wrote it; fixed: settings not to be changed."""

    asked: Run
    fixed: frozenset[str] = field(default_factory=frozenset)
    rates: Rates | None = None


def predict(run: Run, wish: Wish, budget: Budget) -> Plan:
    """The Plan of one run, whether it fits or not."""
    found = moments(run)
    moment = max(found, key=lambda name: sum(found[name].values()))
    parts = found[moment]
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
    most = max(sum(parts.values()) for parts in moments(run).values())
    return most <= budget.usable(run.device_type)


def fastest(wish: Wish, budget: Budget, most: int = SHOWN) -> list[Plan]:
    """At most `most` plans that fit, the one to take first; [] where nothing fits.

    One for each optimizer and dtype of weights: its best.
    """
    best = {}
    for way in ways(wish):
        found = largest_micro_batch(way, wish, budget)
        if found is None:
            continue
        key = found.variant, found.param_bytes
        cost = seconds(found, wish.rates) * WORTH ** changes(found, wish.asked)
        if key not in best or cost < best[key][0]:
            best[key] = cost, found
    ranked = sorted(best.values(), key=lambda pair: pair[0])[:most]
    return [predict(run, wish, budget) for _, run in ranked]


def changes(run: Run, asked: Run) -> int:
    """How many things differ that change what is learned."""
    return (
        (run.variant != asked.variant)
        + (run.param_bytes != asked.param_bytes)
        + (run.fused != asked.fused)
    )


def ways(wish: Wish):
    """Every way to keep and to compute, as Runs of the asked micro-batch."""
    for kept in ways_to_keep(wish):
        for config in ways_to_compute(kept, wish.fixed):
            yield replace(kept, config=config)


def ways_to_keep(wish: Wish):
    """Optimizers, dtypes of weights, updates inside backward; as asked first."""
    asked, fixed = wish.asked, wish.fixed
    variants, sizes, fused = [asked.variant], [asked.param_bytes], [asked.fused]
    if "optimizer_variant" not in fixed:
        variants += [name for name in VARIANTS if name != asked.variant]
    if not {"param_dtype", "dtype"} & fixed and asked.stream_bytes == 2 and asked.param_bytes == 4:
        sizes.append(2)
    if "optimizer_options" not in fixed and not asked.options and asked.processes == 1:
        fused.append(True)
    for variant in variants:
        for size in sizes:
            for inside in fused:
                if variant == "adam" and (size == 2 or inside):
                    continue
                options = dict(asked.options) if variant == asked.variant else {}
                if inside:
                    options["fused_backward"] = True
                yield replace(asked, variant=variant, param_bytes=size, options=options)


def ways_to_compute(run: Run, fixed) -> list:
    """Configurations: as asked, then each slower and smaller than the one before."""
    config, settings = run.config, ("attention_policy", "q_chunk", "checkpoint_layers", "offload")
    dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
    if set(settings) & fixed or dropout > 0:  # which tiles cannot replay
        return [config]
    whole = replace(config, checkpoint_layers=False, offload=False, k_chunk=None)
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
    sizes = [b for b in range(1, sequences + 1) if sequences % b == 0]
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


def flags_of(run: Run, asked: Run) -> dict:
    """train.py's settings that differ from those asked for, micro-batches always among them."""
    c, before = run.config, asked.config
    flags = {
        "batch_size": run.batch_size,
        "gradient_accumulation_steps": run.micro_batches * run.processes,
    }
    if run.length != asked.length:
        flags["block_size"] = run.length
    for name in ("n_layer", "n_head", "n_embd"):
        if getattr(c, name) != getattr(before, name):
            flags[name] = getattr(c, name)
    for name in ("attention_policy", "q_chunk", "k_chunk", "checkpoint_layers", "offload"):
        if getattr(c, name) != getattr(before, name):
            flags[name] = getattr(c, name)
    if c.attention_policy != before.attention_policy and c.kv_heads != c.n_head:
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
        most = max(sum(parts.values()) for parts in moments(run).values())
        plans.append((most, len(plans), run))
    return predict(min(plans)[2], wish, budget)


# ---------------------------------------------------------------------- goals


def longest(wish: Wish, budget: Budget, most: int = SHOWN) -> list[Plan]:
    """Plans for the longest context that fits, one sequence at a time; the longest first.

    One for each optimizer and dtype of weights, each with the way to compute that reaches farthest.
    """
    best = {}
    for way in ways(wish):
        key = way.variant, way.param_bytes, way.fused
        floor = best[key][0] if key in best else 0
        length = longest_length(way, budget, floor)
        if length > floor:
            best[key] = length, with_length(way, length)
    ranked = sorted(best.values(), key=lambda p: (-p[0], changes(p[1], wish.asked)))
    kept, seen = [], set()
    for length, run in ranked:
        if length not in seen and (run.variant, run.param_bytes) not in seen:
            seen |= {length, (run.variant, run.param_bytes)}
            kept.append(run)
    return [predict(run, wish, budget) for run in kept[:most]]


def with_length(run: Run, length: int) -> Run:
    """The run over one sequence of `length` tokens, its table of positions as long."""
    config = replace(run.config, block_size=length)
    return replace(run, config=config, block_size=length, batch_size=1, micro_batches=1)


def longest_length(run: Run, budget: Budget, floor: int = 0, step: int = 256) -> int:
    """The largest multiple of `step` tokens that fits, at least `floor`; else 0."""
    low, high = floor // step, (1 << 27) // step
    if not fits(with_length(run, (low + 1) * step), budget):
        return 0
    low += 1
    while high - low > 0 and high > low:
        middle = (low + high + 1) // 2
        if fits(with_length(run, middle * step), budget):
            low = middle
        else:
            high = middle - 1
    return low * step


# name: (layers, heads, width), the other shapes as the family has them
LADDERS = {
    "gpt2": {
        "124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280),
        "1.5B": (48, 25, 1600), "2.6B": (32, 32, 2560), "6.7B": (32, 32, 4096),
        "13B": (40, 40, 5120), "30B": (48, 56, 7168), "66B": (64, 72, 9216),
    },
    "llama": {
        "135M": (30, 9, 576), "1.2B": (16, 32, 2048), "3.2B": (28, 24, 3072),
        "8B": (32, 32, 4096), "13B": (40, 40, 5120), "33B": (60, 52, 6656),
        "70B": (80, 64, 8192),
    },
}  # fmt: skip


def largest(wish: Wish, budget: Budget, family: str = "gpt2", most: int = SHOWN) -> list[Plan]:
    """Plans for the largest model of a family that trains on the asked tokens; its best first."""
    if family not in LADDERS:
        raise UserError(f"unknown family {family!r}; choose one of: {', '.join(LADDERS)}")
    for layers, heads, width in reversed(LADDERS[family].values()):
        config = shape_of(wish.asked.config, family, layers, heads, width)
        bigger = replace(wish, asked=replace(wish.asked, config=config))
        if plans := fastest(bigger, budget, most):
            return [replace(p, settings=p.settings | flags_of(p.run, wish.asked)) for p in plans]
    return []


def shape_of(config, family, layers, heads, width):
    """`config` with a shape of a family."""
    shape = dict(n_layer=layers, n_head=heads, n_embd=width, n_inner=None, n_kv_head=None)
    if family == "llama":
        groups = next(g for g in (8, 4, 3, 1) if heads % g == 0) if heads > 9 else 3
        inner = int(width * 3.5) if width == 4096 else -(-int(width * 8 / 3) // 256) * 256
        shape |= dict(n_kv_head=groups, n_inner=inner, mlp="swiglu", norm="rmsnorm")
        shape |= dict(position="rope", bias=False, tie_embeddings=width <= 3072)
    return replace(config, **shape)


def refusal(wish: Wish, budget: Budget) -> str:
    """Why no plan fits, in one line: the floor of this model, the largest that would fit."""
    floor = leanest(wish, budget)
    line = (
        f"no plan fits {in_words(budget.memory)}: the least that this model takes is "
        f"{in_words(floor.peak)} ({floor.moment}; {floor.flags})"
    )
    for name, (layers, heads, width) in reversed(LADDERS["gpt2"].items()):
        config = replace(
            wish.asked.config, n_layer=layers, n_head=heads, n_embd=width, n_inner=None,
            n_kv_head=None,
        )  # fmt: skip
        smaller = replace(wish, asked=replace(wish.asked, config=config))
        if fastest(smaller, budget, 1):
            return f"{line}; the largest of its kind that would fit is {name}"
    return line
