"""What fits, and how to start it: `python plan.py config/train_gpt2.py --memory=24GB`.

    python plan.py --memory=8GB --goal=longest --n_layer=24 --n_head=16 --n_embd=1024
    python plan.py --memory=24GB --goal=largest --family=llama --block_size=8192
    python plan.py --memory=24GB --init_from=data/smollm2 --block_size=32768
    python plan.py --memory=8GB --init_from=gpt2-xl --for=sample

Takes every setting of train.py, config files included, and answers with train.py's command line.
The memory of a step is predicted by formulas (leangpt/memory/formulas.py); nothing of the model's
size is allocated, and of a published model config.json alone is read. Settings given as flags stay
as they are, those of config files and defaults may be changed, tokens an iteration are kept. Times
are for comparing plans, unless --calibrate has measured this machine once: then they are seconds.
"""

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from configurator import parse_config, read_words
from leangpt.memory.decoding import (
    Decoding,
    fits_decoding,
    longest_context,
    tokens_per_second,
    ways_to_decode,
)
from leangpt.memory.goals import GOALS, LADDERS, plans
from leangpt.memory.search import SHOWN, Budget, divisors, fits, predict
from leangpt.memory.speed import calibrate, known_rates
from leangpt.memory.units import in_words, parse_bytes
from leangpt.parallel.engine import MODES
from leangpt.runs.checkpoint import checkpoint_to_resume, load_checkpoint
from leangpt.system.errors import UserError, exit_cleanly, named_as_typed
from leangpt.system.host_memory import available_memory
from leangpt.system.runtime import DTYPES
from leangpt.text.folder import read_meta
from leangpt.training.batches import share_of
from leangpt.training.planning import largest_parts, run_config, wish_of
from leangpt.training.settings import Settings as TrainSettings
from leangpt.training.start import adopted_block_size, resumed_settings
from model import GPTConfig
from optimizers import check_freeing, run_options

PURPOSES = ("train", "sample")


@dataclass
class Settings(TrainSettings):
    """What there is, and what for; then all that train.py can be told."""

    # the plan (memory is of the device: 24GB, 24GiB, 512MB; None: this machine's)
    goal: str = field(default="", metadata={"help": f"{' | '.join(GOALS)}; none: does it fit?"})
    purpose: str = field(
        default="train", metadata={"alias": "for", "help": f"plan to {' | '.join(PURPOSES)}"}
    )
    host_memory: str | None = None  # for offload; None: this machine's, where it has the device
    devices: int = 1  # GPUs, a process each: --parallel and --context_parallel say how they share
    tokens_per_iteration: int | None = None  # over all micro-batches; None: as the settings have it
    family: str = field(
        default="gpt2", metadata={"help": f"whose sizes `largest` climbs: {' | '.join(LADDERS)}"}
    )
    vocab_size: int | None = None  # of a model from scratch; None: the prepared data set's
    kv_bits: int | None = None  # for sample: 8 | 4: bits of the past's rows
    num_samples: int = 1  # for sample: texts at once
    calibrate: bool = False  # measure this machine's rates first, in some seconds, and keep them


NEEDS = {  # (setting, value) -> flags that say nothing without it
    ("goal", "largest"): {"family"},
    ("purpose", "sample"): {"kv_bits", "num_samples"},
    ("purpose", "train"): {"tokens_per_iteration", "devices"},
    ("init_from", "scratch"): {"vocab_size"},
}
BATCH = {"batch_size", "gradient_accumulation_steps", "tokens_per_iteration"}
CHOOSES = {  # goal -> what it decides itself
    "longest": {"block_size", *BATCH},
    "largest": {"n_layer", "n_head", "n_embd", "n_kv_head", "init_from"},
}
OWN = (  # which train.py does not know
    "goal purpose host_memory devices tokens_per_iteration family vocab_size kv_bits num_samples "
    "calibrate memory"
).split()


def main(argv=None):
    """Parse, plan, print."""
    settings, given = parse_config(Settings, argv)
    with named_as_typed(given.typed):
        answer(settings, given, list(read_words(Settings, argv)))


def answer(settings, given, words):
    """Print what fits. words: of the command line, as read_words has them."""
    named = {key for _, key, _ in words if key}
    check(settings, named)
    auto = settings.attention_policy == "auto"
    if auto:
        settings = replace(settings, attention_policy="cache")
    settings, config = with_shape(settings, given)
    settings = with_pieces(with_tokens(settings, named), named)
    device, dtype = where(settings)
    here = device.type == "cpu" or torch.cuda.is_available()
    rates = known_rates(device, dtype) if here else None
    if settings.calibrate:
        if not here:
            raise UserError("calibrate measures this machine, which has no GPU: use --device=cpu")
        rates = calibrate(device, dtype)
    budget = budget_of(settings, device, here)
    flags = named - set(OWN) - ({"attention_policy"} if auto else set())
    print(f"{'model':<10} {describe(config)}")
    print(f"{'memory':<10} {describe_budget(budget, device, settings)}")
    if settings.purpose == "sample":
        how = Decoding(
            config, settings.num_samples, dtype.itemsize, settings.int4, 32, settings.kv_bits,
            device.type,
        )  # fmt: skip
        return plan_decoding(settings, how, named, budget, rates)
    options = run_options(settings)
    impossible = ""
    try:
        check_freeing(settings, options, dtype, settings.devices // settings.context_parallel)
    except UserError as error:  # of several micro-batches, which a plan joins where it may
        if dtype == torch.float16 or BATCH & named:
            raise
        impossible = str(error)
    if settings.devices > 1 and options.get("gradient_bits"):
        raise UserError("gradient_bits runs on one process: leave out --devices")
    if settings.devices > 1 and settings.parallel == "ddp" and options.get("fused_backward"):
        raise UserError("fused_backward runs on shares of weights: use --parallel=fsdp, not ddp")
    how = (options, dtype, device.type, settings.devices, rates, budget.memory)
    wish = wish_of(settings, flags, config, *how)
    plan_training(settings, wish, budget, words, impossible)


# ---------------------------------------------------------------------- what there is


def check(settings, named):
    """Raise UserError for what is none of the choices, and for flags that a plan would not heed.

    named: what the command line sets."""
    for name, known in (("purpose", PURPOSES), ("goal", ("", *GOALS)), ("family", LADDERS)):
        if (value := getattr(settings, name)) not in known:
            choices = ", ".join(filter(None, known))
            raise UserError(f"unknown {name} {value!r}; choose one of: {choices}")
    for name, most in (("devices", 2**20), ("num_samples", 2**20), ("vocab_size", 2**31 - 1)):
        value = getattr(settings, name)
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{name} must be positive and at most {most:,}, not {value:,}")
    if settings.kv_bits not in (None, 8, 4):
        raise UserError(f"kv_bits={settings.kv_bits}: use 8, 4, or None for an exact cache")
    if settings.parallel not in MODES:
        raise UserError(
            f"unknown parallel={settings.parallel!r}; choose one of: {', '.join(MODES)}"
        )
    if (settings.parallel == "none") != (settings.devices == 1) and settings.parallel != "auto":
        raise UserError(f"parallel={settings.parallel} is not for --devices={settings.devices}")
    if settings.devices % settings.context_parallel:
        raise UserError(
            f"context_parallel={settings.context_parallel} must divide the processes, of which "
            f"--devices={settings.devices} has one each"
        )
    for needs, names in NEEDS.items():
        if named & names and not getattr(settings, needs[0]) == needs[1]:
            flag = "for" if needs[0] == "purpose" else needs[0]
            raise UserError(
                f"{', '.join(sorted(named & names))}: for plans with --{flag}={needs[1]} alone"
            )
    for goal, names in CHOOSES.items():
        if settings.goal == goal and named & names:
            raise UserError(f"goal={goal} chooses {', '.join(sorted(named & names))}: leave it out")
    if settings.purpose == "sample" and settings.goal == "largest":
        raise UserError("purpose=sample plans the model it is given: leave out goal=largest")
    if settings.goal == "largest" and settings.family != "gpt2" and "vocab_size" in named:
        raise UserError(f"family={settings.family} has its own vocabularies: leave out vocab_size")


def where(settings):
    """(device, dtype of products) of the plan: this machine's, or with memory=... a GPU's."""
    name = settings.device
    if name == "auto":
        elsewhere = settings.memory is not None
        name = "cuda" if elsewhere or torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name!r}: plans are made for cpu and cuda")
    words = settings.dtype if settings.param_dtype == "float32" else settings.param_dtype
    if words == "auto":
        words = "bfloat16" if device.type == "cuda" else "float32"
    if words not in DTYPES:
        raise UserError(f"unknown dtype {words!r}; choose one of: auto, {', '.join(DTYPES)}")
    return device, DTYPES[words]


def budget_of(settings, device, here) -> Budget:
    """The memory to plan for. Raises UserError where it is neither given nor here."""
    host = settings.host_memory
    host = parse_bytes(host, "host_memory") if host else available_memory() if here else None
    if settings.memory:
        return Budget(parse_bytes(settings.memory), host)
    if not here:
        raise UserError("no GPU here: say how much memory yours has, as in --memory=24GB")
    if device.type == "cuda":
        return Budget(torch.cuda.mem_get_info(device)[1], host)
    return Budget(available_memory() or 0, host)


def with_tokens(settings, named):
    """`settings` with as many sequences an iteration as tokens_per_iteration asks for, in
    micro-batches of batch_size where the command line sets that."""
    if settings.tokens_per_iteration is None:
        return settings
    each = settings.batch_size if "batch_size" in named else 1
    count, left = divmod(settings.tokens_per_iteration, settings.block_size * each)
    if left or count < 1:
        raise UserError(
            f"tokens_per_iteration={settings.tokens_per_iteration:,} is not a whole number of "
            f"{'micro-batches' if each > 1 else 'sequences'} of block_size={settings.block_size}"
            f"{f' x batch_size={each}' if each > 1 else ''}"
        )
    if "gradient_accumulation_steps" in named:
        raise UserError("tokens_per_iteration chooses gradient_accumulation_steps: leave it out")
    if each > 1:
        return replace(settings, gradient_accumulation_steps=count)
    return replace(settings, batch_size=count, gradient_accumulation_steps=1)


def with_pieces(settings, named):
    """`settings` with sequences in pieces where there are fewer of them than devices, and says so:
    on as few processes as leaves each a share."""
    sequences = settings.batch_size * settings.gradient_accumulation_steps
    if settings.goal == "longest" or sequences >= settings.devices or "context_parallel" in named:
        return settings
    for K in divisors(settings.devices):
        try:
            share_of(settings, world_size=settings.devices // K)
        except UserError:
            continue
        print(
            f"{'note':<10} an iteration's sequences are {sequences}, fewer than the devices: each "
            f"in pieces on {K} of them"
        )
        return replace(settings, context_parallel=K)
    return settings


def with_shape(settings, given):
    """(settings as the run would adopt them, GPTConfig), from the model's description alone."""
    checkpoint = vocabulary = None
    if settings.init_from in ("resume", "auto"):
        checkpoint = checkpoint_of(settings)
        settings = replace(settings, init_from="resume" if checkpoint else "scratch")
    if checkpoint:
        settings = resumed_settings(settings, given, checkpoint)
    elif settings.init_from == "scratch":
        vocabulary = settings.vocab_size or vocabulary_of(settings)
    config = run_config(GPTConfig, settings, given, vocabulary, checkpoint)
    return replace(settings, block_size=adopted_block_size(settings, given, config)), config


def checkpoint_of(settings):
    """The checkpoint that a run in out_dir would go on from, on the disk; None for auto without."""
    try:
        return load_checkpoint(checkpoint_to_resume(Path(settings.out_dir)), mmap=True)
    except UserError:
        if settings.init_from == "auto" and not any(Path(settings.out_dir).glob("*.pt")):
            return None
        raise


def vocabulary_of(settings) -> int:
    """The prepared data set's number of tokens; where there is none, GPT-2's, and says so."""
    folder = Path(settings.data_dir) / settings.dataset
    try:
        return read_meta(folder)["vocab_size"]
    except UserError:
        print(f"{'note':<10} {folder} is not prepared: a vocabulary of 50,304, GPT-2's")
        return GPTConfig.vocab_size


# ---------------------------------------------------------------------- what fits


def plan_training(settings, wish, budget, words, impossible=""):
    """Print whether the run fits, where no goal is set; then plans. Raises UserError for none.

    words: of the command line; impossible: why train.py would not take the run as asked."""
    asked = wish.asked
    if not settings.goal and impossible:
        print(f"{'as asked':<10} {impossible}")
    elif not settings.goal:
        found = predict(asked, wish, budget)
        fit = "fits" if fits(asked, budget) else "does not fit"
        print(f"{'as asked':<10} {fit}: {in_words(found.peak)} at its fullest, {found.moment}")
        show_parts(found)
    ranked = plans(wish, budget, settings.goal or "fastest", settings.family)
    fastest = min(plan.seconds for plan in ranked)
    for number, plan in enumerate(ranked, 1):
        print(f"\n{f'plan {number}':<10} {headline(plan, fastest, settings.goal)}")
        show_parts(plan)
        if plan.host:
            print(f"{'':<10} {in_words(plan.host)} of pinned host memory")
        print(f"{'gives up':<10} {'; '.join(plan.gives_up) or 'nothing'}")
        print(f"{'flags':<10} {plan.flags}")
    start = command(words, "train.py", ranked[0].flags)
    torchrun = f"torchrun --standalone --nproc_per_node={settings.devices} "
    print(f"\n{torchrun if settings.devices > 1 else 'python '}{start}")


def headline(plan, fastest, goal) -> str:
    """Time, peak and what is left of a plan."""
    time = f"{plan.seconds:.3g} s a step" if plan.measured else f"{plan.seconds / fastest:.2f}x"
    words = [f"{time} the fastest's time" if not plan.measured else time]
    if goal == "longest":
        words = [f"{plan.run.length:,} tokens"]
    if goal == "largest":
        words = [f"{parameters(plan.run.config) / 1e9:.2f}B parameters", *words]
    words.append(f"{in_words(plan.peak)} at its fullest, {plan.moment}")
    words.append(f"{in_words(plan.left)} left free")
    return "; ".join(words)


def show_parts(plan):
    """The parts of a plan's peak, in a line."""
    parts = ", ".join(f"{name} {in_words(size)}" for name, size in largest_parts(plan))
    print(f"{'':<10} {parts}")


def plan_decoding(settings, asked, named, budget, rates):
    """The same for sample.py: ways to decode at this context, then the longest context of each.

    asked: a Decoding."""
    config, rows, commands = asked.config, [], []
    for how in ways_to_decode(asked, named):
        longest = longest_context(how, budget)
        if settings.goal != "longest" and not fits_decoding(how, budget):
            continue
        if longest:
            rows.append((len(how.gives_up), -longest, how))
    if not rows:
        least = min(sum(w.parts().values()) for w in ways_to_decode(asked))
        raise UserError(
            f"nothing fits {in_words(budget.memory)}: {config.block_size:,} tokens of this model "
            f"take {in_words(least)} at least; try a smaller --block_size or --goal=longest"
        )
    order = (lambda row: row[1]) if settings.goal == "longest" else (lambda row: row[:2])
    for number, (_, longest, how) in enumerate(sorted(rows, key=order)[:SHOWN], 1):
        context = -longest if settings.goal == "longest" else config.block_size
        how = replace(how, config=replace(how.config, block_size=context))
        parts = how.parts()
        at_most = f" {tokens_per_second(how, rates):,.0f} tokens/s at most;" if rates else ""
        print(
            f"\n{f'plan {number}':<10} {context:,} tokens; {in_words(sum(parts.values()))};"
            f"{at_most} the longest context {-longest:,}"
        )
        print(f"{'':<10} {', '.join(f'{name} {in_words(size)}' for name, size in parts.items())}")
        print(f"{'gives up':<10} {'; '.join(how.gives_up) or 'nothing'}")
        commands.append(" ".join(f"--{name}={value}" for name, value in how.flags.items()))
        print(f"{'flags':<10} {commands[-1]}")
    model = f"--init_from={shlex.quote(settings.init_from)}"
    if settings.init_from in ("resume", "scratch"):
        model = f"--out_dir={shlex.quote(settings.out_dir)}"
    print(f"\npython sample.py {model} {commands[0]}")


# ---------------------------------------------------------------------- in words


def parameters(config) -> int:
    """Of a model of this configuration."""
    return Decoding(config, itemsize=1).weight_bytes[0]


def describe(config) -> str:
    """A configuration in a line."""
    kind = "GELU" if config.mlp != "swiglu" else "SwiGLU"
    return (
        f"{parameters(config):,} parameters: {config.n_layer} layers, {config.n_head} heads "
        f"({config.kv_heads} for keys and values), {config.n_embd} wide, {kind}, vocabulary "
        f"{config.vocab_size:,}, block {config.block_size:,}"
    )


def describe_budget(budget, device, settings) -> str:
    """The memory that plans are for."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    what = "a GPU" if kind == "cuda" else "a CPU"
    each = f" on each of {settings.devices}" if settings.devices > 1 else ""
    host = f", {in_words(budget.host)} of host memory" if budget.host and kind == "cuda" else ""
    free = in_words(budget.memory - budget.usable(kind))
    return f"{in_words(budget.memory)} of {what}{each}{host}; {free} stay free"


def command(words, script, flags="") -> str:
    """The command line that these words make, without what is plan.py's own, and a plan's flags,
    which stand for those of the same name."""
    kept, anew = [], {flag.removeprefix("--").split("=")[0] for flag in flags.split()}
    for _, key, text in words:
        if key is None:
            kept.append(shlex.quote(text))
        elif key not in OWN and key not in anew:
            kept.append(shlex.quote(f"--{key}={text}"))
    return " ".join([script, *kept, *flags.split()])


if __name__ == "__main__":
    exit_cleanly(main)
