"""Runs drawn at random by a seed from all that train.py can be asked for, to hold plans against.

A draw is a dict of train.py's settings, with those of the model that only published weights have
(mlp, norm, tied or not, width of the MLP) beside them.
"""

import math
import random
from dataclasses import dataclass

import train
from leangpt.optim import VARIANTS

MOST_PAIRS = 4000  # of tiles in a step, on a GPU: more are minutes of launches
VOCABULARIES = {"cpu": (65, 256, 1024, 4096, 16384), "cuda": (256, 4096, 32000, 50257, 65000)}


@dataclass
class Settings(train.Settings):
    """train.py's, and the shapes of published models."""

    mlp: str = "gelu"
    norm: str = "layernorm"
    tie_embeddings: bool = True
    n_inner: int | None = None


@dataclass(frozen=True)
class Space:
    """What is drawn from, and how much one step may compute and keep."""

    widths: tuple[int, ...]
    head_dims: tuple[int, ...]
    layers: tuple[int, int]
    tokens: tuple[int, int]  # of a sequence
    batch: int
    parameters: tuple[float, float]
    work: float  # products of a step, at most
    bytes: float  # of a step's activations as the plain block keeps them, at most


SPACES = {
    "cpu": Space(
        (32, 48, 64, 96, 128, 192, 256, 384), (8, 16, 32, 64), (1, 8), (64, 8192), 16,
        (1e5, 3e7), 6e9, 6e8,
    ),
    "cuda": Space(
        (256, 512, 768, 1024, 1600, 2048, 3072, 4096), (64, 128), (2, 40), (128, 262144), 64,
        (1e6, 9e9), 2e14, 6e11,
    ),
}  # fmt: skip


def draws(device: str, count: int, seed: int) -> list[dict]:
    """`count` runs; the same for the same arguments, and the first of a longer list."""
    rng, space, found = random.Random(f"{device} {seed}"), SPACES[device], []
    while len(found) < count:
        if (drawn := draw(rng, space, device)) is not None:
            found.append(drawn | {"number": len(found), "seed": seed})
    return found


def draw(rng, space, device):
    """One run, or None where it is too small, too large, or contradicts itself."""

    def power(low, high):
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    width = rng.choice(space.widths)
    heads = width // rng.choice(space.head_dims)
    if not heads or width % heads:
        return None
    length, vocabulary = power(*space.tokens), rng.choice(VOCABULARIES[device])
    swiglu = rng.random() < 0.4
    run = dict(
        n_embd=width,
        n_head=heads,
        n_layer=power(*space.layers),
        block_size=length,
        batch_size=power(1, space.batch),
        gradient_accumulation_steps=rng.choice((1, 1, 1, 2, 3)),
        vocab_size=vocabulary,
        position=rng.choice(("learned", "rope", "rope", "none")),
        mlp="swiglu" if swiglu else rng.choice(("gelu", "gelu_tanh")),
        norm="rmsnorm" if swiglu and rng.random() < 0.8 else "layernorm",
        bias=rng.random() < 0.2,
        n_inner=8 * width // 3 // 16 * 16 if swiglu and rng.random() < 0.7 else None,
        tie_embeddings=rng.random() < 0.6,
        n_kv_head=rng.choice([g for g in range(1, heads + 1) if heads % g == 0]),
        optimizer_variant=rng.choice(list(VARIANTS)),
        param_dtype=rng.choice(("float32", "float32", "bfloat16")),
        dtype=rng.choice(("float32", "bfloat16")),
        dropout=rng.choice((0.0, 0.0, 0.0, 0.1)),
        compile=device == "cuda" and rng.random() < 0.1,
    )
    policy = rng.choice(("cache", "cache", "grouped", "recompute", "recompute"))
    if policy == "grouped" and run["n_kv_head"] == heads:
        policy = "cache"
    run |= dict(attention_policy=policy, q_chunk=None, k_chunk=None)
    if rng.random() < 0.5:
        run["q_chunk"] = min(16384, 1 << rng.randint(6, max(6, length.bit_length() - 1)))
        run["k_chunk"] = rng.choice((None, run["q_chunk"] // 2, run["q_chunk"]))
    run["checkpoint_layers"] = rng.random() < 0.35
    run["offload"] = device == "cuda" and run["checkpoint_layers"] and rng.random() < 0.4
    # what tiles cannot replay; and half the others with dropout have it on attention too
    tiled = run["q_chunk"] or run["checkpoint_layers"] or policy == "recompute"
    run["attention_dropout"] = 0.0 if tiled or length > 1024 or rng.random() < 0.5 else None
    run["optimizer_options"] = ""
    if run["optimizer_variant"] != "adam" and run["gradient_accumulation_steps"] == 1:
        run["optimizer_options"] = rng.choice(("", "fused_backward=True"))
    if run["param_dtype"] == "bfloat16":
        if run["optimizer_variant"] == "adam":
            return None
        run["dtype"] = "auto"
    few = device == "cpu" or pairs_of_tiles(run) <= MOST_PAIRS
    return run if few and fits_space(run, space) else None


def pairs_of_tiles(run) -> float:
    """Tiles of queries by tiles of keys in a step: what its kernel launches grow with."""
    if not (q := run["q_chunk"]):
        return 0
    T, k = run["block_size"], run["k_chunk"] or q
    tokens = run["gradient_accumulation_steps"] * run["batch_size"] * T
    return run["n_layer"] * tokens / q * (1 + T / k / 2)


def fits_space(run, space) -> bool:
    """Is it of a size that can be measured in seconds?"""
    C, L, V, T = (run[name] for name in ("n_embd", "n_layer", "vocab_size", "block_size"))
    inner = run["n_inner"] or 4 * C
    group = run["n_head"] / run["n_kv_head"]
    layer = (2 + 2 / group) * C * C + (3 if run["mlp"] == "swiglu" else 2) * C * inner
    parameters = L * layer + (2 - run["tie_embeddings"]) * V * C
    tokens = run["batch_size"] * T
    work = run["gradient_accumulation_steps"] * tokens * (parameters + L * T * C)
    if run["optimizer_variant"].startswith("muonsn"):
        work += 8 * L * layer * C
    kept = L * tokens * (7 * C + 3 * inner) * 4
    attention = run["attention_dropout"] is None and run["dropout"]
    kept += 12 * attention * run["batch_size"] * run["n_head"] * T * T * L
    if space is SPACES["cuda"] and run["dtype"] == "float32":
        work *= 4  # TF32 and attention without tensor cores
    low, high = space.parameters
    plain = not (run["checkpoint_layers"] or run["q_chunk"])
    return low <= parameters <= high and work <= space.work and kept * plain <= space.bytes
