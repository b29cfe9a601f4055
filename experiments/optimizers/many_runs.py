"""Many training runs at once on one device: the protocol that every optimizer is held to.

A `Setup` fixes model, data order, schedule and iterations; a `Run` names what differs: optimizer,
two learning rates and a seed. The seed alone decides initial weights and data order, so two
optimizers with one seed see the same model and the same tokens, and their losses can be paired.
"""

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from experiments.optimizers.stacked_gpt import StackedGPT, Step
from leangpt.system.errors import UserError
from leangpt.text.dataset import load_dataset
from model import GPTConfig

LAST = 100  # iterations whose mean training loss is kept


@dataclass(frozen=True)
class Setup:
    """What all runs share."""

    name: str
    model: dict  # GPTConfig without vocab_size
    batch_size: int
    iterations: int
    warmup: int = 100
    clip: float = 1.0  # of the norm of all gradients
    clip_late: bool = False  # by the norm of the step before
    weight_decay: float = 0.1
    betas: tuple = (0.9, 0.99)
    eval_interval: int | None = None  # None: the validation loss is taken once, at the end
    dtype: torch.dtype = torch.float32  # of the matrix products
    weights: torch.dtype = torch.float32  # bfloat16 ones are rounded stochastically
    compile: bool = False  # torch.compile the forward and backward

    def config(self, vocab_size):
        """The GPTConfig for a vocabulary."""
        return GPTConfig(vocab_size=vocab_size, **self.model)


SEED = dict(block_size=64, n_layer=4, n_head=4, n_embd=128)

SETUPS = {
    # 0.8M parameters: the model of a CPU's few minutes
    "seed": Setup("seed", SEED, 12, 2000),
    # the same with weights, gradients and products in bfloat16; then also with gradients clipped as
    # updates inside backward have it, or not at all
    "seed_bf16": Setup("seed_bf16", SEED, 12, 2000, weights=torch.bfloat16),
    "seed_fused": Setup("seed_fused", SEED, 12, 2000, clip_late=True, weights=torch.bfloat16),
    "seed_unclipped": Setup("seed_unclipped", SEED, 12, 2000, clip=0.0, weights=torch.bfloat16),
    # 10.7M: nanoGPT's config/train_shakespeare_char.py (published best validation loss 1.4697) in
    # a fifth of its iterations, 16 passes over the text: in more, the best only overfit sooner
    "char384": Setup(
        "char384",
        dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
        64,
        1000,
        eval_interval=250,
        dtype=torch.bfloat16,
        compile=True,
    ),
    # 51M with GPT-2's vocabulary: 8.2M tokens of data/python_stdlib (stdlib_text.py)
    "bpe51m": Setup(
        "bpe51m",
        dict(block_size=512, n_layer=8, n_head=8, n_embd=512),
        16,
        1000,
        eval_interval=500,
        betas=(0.9, 0.95),
        dtype=torch.bfloat16,
        compile=True,
    ),
}


@dataclass(frozen=True, order=True)
class Run:
    """One training run; equal runs give equal losses."""

    variant: str
    learning_rate: float  # of linear weights, at its peak
    embedding_lr: float  # of everything else
    seed: int


@dataclass(frozen=True)
class Text:
    """Token streams on the host: train and val (n,) int64."""

    train: torch.Tensor
    val: torch.Tensor
    vocab_size: int
    sha256: str  # of the text


def read_text(path, block_size):
    """A prepared dataset's folder, or a text file taken character by character -> Text.

    Of a file the first nine tenths of the characters are for training, as nanoGPT has it. A
    vocabulary of GPT-2's is padded to a multiple of 64. Raises UserError for a missing or too
    short text.
    """
    path = Path(path)
    if path.is_dir():
        dataset = load_dataset(path.name, str(path.parent))
        parts = [torch.from_numpy(part.astype("int64")) for part in (dataset.train, dataset.val)]
        vocab_size, sha256 = dataset.vocab_size, dataset.sha256 or ""
        vocab_size = -(-vocab_size // 64) * 64 if vocab_size > 1024 else vocab_size
    elif path.is_file():
        raw = path.read_bytes()
        text, sha256 = raw.decode("utf-8"), hashlib.sha256(raw).hexdigest()
        number = {character: i for i, character in enumerate(sorted(set(text)))}
        tokens = torch.tensor([number[character] for character in text])
        cut = int(0.9 * len(tokens))
        parts, vocab_size = (tokens[:cut], tokens[cut:]), len(number)
    else:
        raise UserError(
            f"no file or folder {path}: run data/shakespeare_char/prepare.py, or give "
            "a text with --input=PATH"
        )
    if min(len(part) for part in parts) <= block_size:
        raise UserError(f"{path} is too short: each split needs more than {block_size} tokens")
    return Text(*parts, vocab_size, sha256)


def schedule(setup, iteration):
    """Learning rate as a share of its peak: linear warm-up, then a cosine to a tenth (nanoGPT)."""
    if iteration < setup.warmup:
        return (iteration + 1) / (setup.warmup + 1)
    ratio = (iteration - setup.warmup) / (setup.iterations - setup.warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * ratio))


def set_learning_rates(optimizers, share):
    """Every group's lr = share of its initial_lr; tensor rates are filled in place."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["initial_lr"] * share
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def data_order(setup, text, seed):
    """Window starts of one run, (iterations, B) int64: a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    high = len(text.train) - setup.model["block_size"]
    return torch.randint(high, (setup.iterations, setup.batch_size), generator=generator)


@torch.no_grad()
def validation_losses(stack, tokens, block_size, dtype):
    """Mean loss over the whole stream in consecutive blocks, per replica: (M,) float64."""
    M, stack.training = len(stack.replicas), False
    blocks = (len(tokens) - 1) // block_size
    idx = tokens[: blocks * block_size].view(blocks, block_size)
    targets = tokens[1 : blocks * block_size + 1].view(blocks, block_size)
    at_once = max(1, 2**28 // (M * block_size * max(stack.config.vocab_size, 1024)))
    total = torch.zeros(M, dtype=torch.float64, device=tokens.device)
    for start in range(0, blocks, at_once):
        x, y = idx[start : start + at_once], targets[start : start + at_once]
        with torch.autocast(
            tokens.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16
        ):
            losses = stack.losses(x.expand(M, *x.shape), y.expand(M, *y.shape))
        total += losses.double() * len(x)
    stack.training = True
    return total / blocks


@dataclass(frozen=True)
class Cohort:
    """Neighbouring replicas with one optimizer and one pair of learning rates."""

    stack: StackedGPT
    start: int
    stop: int

    @property
    def module(self):
        """Its replicas as one nn.Module, for optimizers built from a module."""
        return nn.ModuleList(self.stack.replicas[self.start : self.stop])

    @property
    def slices(self):
        """Its rows of every weight as one parameter each, for element-wise optimizers."""
        return self.stack.slices(self.start, self.stop)


def cohorts(stack, runs):
    """Split sorted runs where variant or learning rates change: [(first run, Cohort), ...]."""
    starts = [i for i, run in enumerate(runs) if i == 0 or _setting(run) != _setting(runs[i - 1])]
    return [
        (runs[start], Cohort(stack, start, stop))
        for start, stop in zip(starts, [*starts[1:], len(runs)])
    ]


def _setting(run):
    return run.variant, run.learning_rate, run.embedding_lr


def train_runs(setup, runs, text, build, device="cpu", graph=None, report=None):
    """Train all `runs` side by side; return one dict of results a run, in sorted order.

    build([(first run, Cohort), ...], Setup) -> list of optimizers, groups with initial_lr.
    graph: replay forward and backward as a CUDA graph (None: on CUDA).
    report(iteration, mean loss): called about every tenth of the way.
    """
    runs, device = sorted(runs), torch.device(device)
    graph = device.type == "cuda" if graph is None else graph
    stack = StackedGPT(
        setup.config(text.vocab_size), [run.seed for run in runs], device, setup.weights
    )
    optimizers = build(cohorts(stack, runs), setup)
    orders = {run.seed: data_order(setup, text, run.seed) for run in runs}
    offsets = torch.stack([orders[run.seed] for run in runs], 1).to(device)  # (iterations, M, B)
    train, val = text.train.to(device), text.val.to(device)
    block_size = setup.model["block_size"]
    if device.type == "cuda":
        torch.cuda.manual_seed(runs[0].seed)  # dropout's noise
    step = Step(
        stack,
        train,
        setup.batch_size,
        block_size,
        setup.clip,
        setup.dtype,
        graph,
        setup.compile,
        setup.clip_late,
    )
    last = torch.zeros(len(runs), device=device)
    curve = {}  # iteration -> validation losses (M,)
    started = time.perf_counter()
    for iteration in range(setup.iterations):
        if setup.eval_interval and iteration % setup.eval_interval == 0:
            curve[iteration] = validation_losses(stack, val, block_size, setup.dtype)
        set_learning_rates(optimizers, schedule(setup, iteration))
        losses = step(offsets[iteration])
        for optimizer in optimizers:
            optimizer.step()
        if iteration >= setup.iterations - LAST:
            last += losses
        if report and iteration % max(1, setup.iterations // 10) == 0:
            report(iteration, losses.nanmean().item())
    curve[setup.iterations] = validation_losses(stack, val, block_size, setup.dtype)
    seconds = time.perf_counter() - started
    final = curve[setup.iterations].tolist()
    best = torch.stack(list(curve.values())).nan_to_num(math.inf).amin(0).tolist()
    last = (last / min(LAST, setup.iterations)).tolist()
    return [
        dict(
            setup=setup.name,
            variant=run.variant,
            learning_rate=run.learning_rate,
            embedding_lr=run.embedding_lr,
            seed=run.seed,
            iterations=setup.iterations,
            val_loss=round(final[i], 6),
            best_val_loss=round(best[i], 6),
            train_loss=round(last[i], 6),
            replicas=len(runs),
            batch_seconds=round(seconds, 1),
        )
        for i, run in enumerate(runs)
    ]
