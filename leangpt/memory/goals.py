"""What a plan is for: the fastest run, the longest context, the largest model; or why none fits,
and, for advice, a plan with those changes alone that it needs."""

import contextlib
import itertools
from dataclasses import replace

from leangpt.memory.run import Run
from leangpt.memory.search import (
    SHOWN,
    Budget,
    Plan,
    Wish,
    changes,
    divisors,
    fastest,
    fits,
    leanest,
    predict,
    shareable,
    ways,
    ways_to_keep,
)
from leangpt.memory.speed import Rates
from leangpt.memory.units import in_words, parse_bytes
from leangpt.system.errors import UserError

STEP = 256  # tokens: the longest contexts are multiples of it
GOALS = ("fastest", "longest", "largest")
NUMBERS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of one


def plan(
    config,
    memory: int | str,
    goal: str = "fastest",
    *,
    batch_size: int = 1,
    micro_batches: int = 1,
    optimizer: str = "adam",
    options: dict | None = None,
    param_dtype: str = "float32",
    dtype: str = "bfloat16",
    device: str = "cuda",
    host_memory: int | str | None = None,
    processes: int = 1,
    parallel: str = "auto",
    context_parallel: int = 1,
    fixed: tuple[str, ...] = (),
    family: str = "gpt2",
    rates: Rates | None = None,
    most: int = SHOWN,
) -> list[Plan]:
    """Runs that fit, the one to take first: at most `most` Plans.

    config: a GPTConfig. memory, host_memory: bytes, or words as "24GB". goal: one of GOALS.
    batch_size, micro_batches: sequences a micro-batch and micro-batches a step, as wished; their
    product is kept. optimizer, options: a variant of build_optimizer and its options. param_dtype:
    of weights and gradients; dtype: of products, autocast's. device: "cuda" or "cpu". fixed: names
    of train.py's settings that may not be changed. processes, parallel, context_parallel: how many
    share a step, and how, as train.py has it. family: whose sizes goal="largest" climbs.
    Nothing is allocated. Raises UserError where nothing fits: what the least takes, and the largest
    model that would.
    """
    if goal not in GOALS:
        raise UserError(f"unknown goal {goal!r}; choose one of: {', '.join(GOALS)}")
    memory = parse_bytes(memory)
    if processes % context_parallel:
        raise UserError(
            f"context_parallel={context_parallel} must divide the processes, which are {processes}"
        )
    asked = Run(
        config,
        batch_size,
        None,
        micro_batches,
        optimizer,
        options or {},
        NUMBERS[param_dtype],
        2 if param_dtype != "float32" else NUMBERS[dtype],
        device,
        processes,
        shared_ways(parallel)[0],
        context_parallel,
        memory if device == "cuda" else None,
        compiled=device == "cuda",
    )
    host = None if host_memory is None else parse_bytes(host_memory, "host_memory")
    budget = Budget(memory, host)
    wish = Wish(asked, frozenset(fixed), rates, parallel=shared_ways(parallel))
    return plans(wish, budget, goal, family, most)


def shared_ways(parallel: str) -> tuple[str, ...]:
    """The ways to share a run of several processes that parallel= leaves, to be asked first."""
    return ("ddp", "fsdp") if parallel == "auto" else (parallel,)


def plans(wish: Wish, budget: Budget, goal: str, family: str = "gpt2", most: int = SHOWN):
    """The Plans of a goal, the one to take first. Raises UserError where there is none."""
    if goal == "largest":
        found = largest(wish, budget, family, most)
    else:
        found = {"fastest": fastest, "longest": longest}[goal](wish, budget, most)
    if not found:
        raise UserError(refusal(wish, budget))
    return found


def longest(wish: Wish, budget: Budget, most: int = SHOWN) -> list[Plan]:
    """Plans for the longest context that fits, one sequence at a time; the longest first.

    One for each optimizer and dtype of weights, each with the way to compute that reaches farthest.
    """
    best, single = {}, replace(wish, asked=replace(wish.asked, batch_size=1, micro_batches=1))
    # those that reach farthest first: the others are soon out of the race
    pieces = [wish.asked.context_parallel]
    if "context_parallel" not in wish.fixed and pieces == [1]:
        pieces = reversed(divisors(wish.asked.processes))
    leanest_first = [*reversed(list(ways(single)))]
    for K, way in itertools.product(pieces, leanest_first):
        way = replace(way, context_parallel=K)
        key = way.variant, way.param_bytes, way.fused
        floor = best[key][0] if key in best else 0
        length = longest_length(way, budget, floor, wish.most)
        if length > floor:
            best[key] = length, with_length(way, length)
    kept = {}
    for length, run in sorted(best.values(), key=lambda p: (-p[0], changes(p[1], wish.asked))):
        if all(length != other.length for other in kept.values()):  # of equals the first
            kept.setdefault((run.variant, run.param_bytes), run)
    return [predict(run, wish, budget) for run in list(kept.values())[:most]]


def with_length(run: Run, length: int) -> Run:
    """The run over one sequence of `length` tokens, its table of positions as long."""
    config = replace(run.config, block_size=length)
    return replace(run, config=config, block_size=length, batch_size=1, micro_batches=1)


def longest_length(run: Run, budget: Budget, floor: int = 0, most: int = 1 << 27) -> int:
    """The largest multiple of STEP tokens that fits, more than `floor` and `most` at most, which
    counts too where it fits; else 0."""
    if fits(with_length(run, most), budget):
        return most if most > floor else 0
    step = STEP
    low, high = floor // step, most // step
    if low >= high or not fits(with_length(run, (low + 1) * step), budget):
        return 0
    low += 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(with_length(run, middle * step), budget):
            low = middle
        else:
            high = middle - 1
    return low * step


def _gpt2(layers, heads, width):
    return dict(n_layer=layers, n_head=heads, n_embd=width, n_inner=None, n_kv_head=None)


def _llama(layers, heads, groups, width, inner, vocabulary, tied):
    return dict(
        n_layer=layers, n_head=heads, n_kv_head=groups, n_embd=width, n_inner=inner,
        vocab_size=vocabulary, tie_embeddings=tied, mlp="swiglu", norm="rmsnorm", position="rope",
        bias=False,
    )  # fmt: skip


# name: what sets a model of the family apart; Llamas by the names that --init_from takes
LADDERS = {
    "gpt2": {
        "124M": _gpt2(12, 12, 768), "355M": _gpt2(24, 16, 1024), "774M": _gpt2(36, 20, 1280),
        "1.5B": _gpt2(48, 25, 1600), "2.6B": _gpt2(32, 32, 2560), "6.7B": _gpt2(32, 32, 4096),
        "13B": _gpt2(40, 40, 5120), "30B": _gpt2(48, 56, 7168), "66B": _gpt2(64, 72, 9216),
    },
    "llama": {
        "HuggingFaceTB/SmolLM2-135M": _llama(30, 9, 3, 576, 1536, 49152, True),
        "HuggingFaceTB/SmolLM2-360M": _llama(32, 15, 5, 960, 2560, 49152, True),
        "meta-llama/Llama-3.2-1B": _llama(16, 32, 8, 2048, 8192, 128256, True),
        "meta-llama/Llama-3.2-3B": _llama(28, 24, 8, 3072, 8192, 128256, True),
        "meta-llama/Llama-3.1-8B": _llama(32, 32, 8, 4096, 14336, 128256, False),
        "meta-llama/Llama-3.1-70B": _llama(80, 64, 8, 8192, 28672, 128256, False),
    },
}  # fmt: skip


def largest(wish: Wish, budget: Budget, family: str = "gpt2", most: int = SHOWN) -> list[Plan]:
    """Plans for the largest model of a family that trains on the asked tokens; its best first."""
    if family not in LADDERS:
        raise UserError(f"unknown family {family!r}; choose one of: {', '.join(LADDERS)}")
    for name, shape in reversed(LADDERS[family].items()):
        bigger = with_config(wish, replace(wish.asked.config, **shape))
        if hopeless(bigger, budget):
            continue
        if found := fastest(bigger, budget, most):
            named = {"init_from": name} if family == "llama" else shape_flags(shape)
            return [replace(p, settings=named | p.settings) for p in found]
    return []


def with_config(wish: Wish, config) -> Wish:
    """The wish for another model, as long a context."""
    return replace(wish, asked=replace(wish.asked, config=config))


def shape_flags(shape) -> dict:
    """train.py's settings of a GPT-2 of that shape."""
    return {name: value for name, value in shape.items() if value is not None}


def hopeless(wish: Wish, budget: Budget) -> bool:
    """Do weights and state alone take too much? Known before ways to compute are tried."""
    kept = (sum(t.count * (t.bytes + t.state_bytes) for t in r.tensors) for r in ways_to_keep(wish))
    return min(kept) > budget.memory


def refusal(wish: Wish, budget: Budget) -> str:
    """Why no plan fits, in one line: the floor of this model, the largest that would fit."""
    floor = leanest(wish, budget)
    line = (
        f"no plan fits {in_words(budget.memory)}: the least that this model takes is "
        f"{in_words(floor.peak)} ({floor.moment}; {floor.flags})"
    )
    for name, shape in reversed(LADDERS["gpt2"].items()):
        smaller = with_config(wish, replace(wish.asked.config, **shape))
        if not hopeless(smaller, budget) and fastest(smaller, budget, 1):
            return f"{line}; the largest of its kind that would fit is {name}"
    return line


# ---------------------------------------------------------------------- fewest changes

OF_THE_CONFIG = (
    "offload checkpoint_first checkpoint_layers k_chunk q_chunk attention_policy".split()
)

FREEING = ("fused_backward", "gradient_bits")  # what becomes of gradients


def with_fewest_changes(found: Plan, wish: Wish, budget: Budget) -> Plan:
    """The plan, as asked wherever it fits without a change; each that is left lowers its peak.

    What changes the learning goes back first, then what changes how a step is computed.
    """
    run = found.run
    names = ("param_dtype", "optimizer_options", "parallel", "optimizer_variant", *OF_THE_CONFIG)
    for name in (*names, "batch"):
        with contextlib.suppress(UserError):  # settings that do not go together
            before = _as_asked(run, wish.asked, name)
            if before != run and shareable(before) and before.tensors and fits(before, budget):
                run = before
    return predict(run, wish, budget)


def _as_asked(run: Run, asked: Run, name: str) -> Run:
    """The run with one of its settings as it was asked for. Raises UserError where it cannot be."""
    if name == "batch":
        return replace(run, batch_size=asked.batch_size, micro_batches=asked.micro_batches)
    if name == "parallel":
        return replace(run, parallel=asked.parallel)
    if name == "param_dtype":
        return replace(run, param_bytes=asked.param_bytes)
    if name == "optimizer_options":
        kept = {k: v for k, v in run.options.items() if k not in FREEING}
        return replace(run, options=kept | _freeing(asked))
    if name == "optimizer_variant":
        if asked.variant == "adam" and (_freeing(run) or run.param_bytes == 2):
            return run  # which adam is not made for
        return replace(run, variant=asked.variant, options=dict(asked.options) | _freeing(run))
    heads = {"n_kv_head": asked.config.n_kv_head} if name == "attention_policy" else {}
    config = replace(run.config, **{name: getattr(asked.config, name)}, **heads)
    return replace(run, config=config)


def _freeing(run):
    return {name: run.options[name] for name in FREEING if run.options.get(name)}
