"""What a plan gives up against the run that was asked for, in words.

Losses against AdamW come from losses.json, which `python -m experiments.report.plan_losses` writes
from the measured results (docs/results/optimizers.md).
"""

import functools
import json
import math
from pathlib import Path

from leangpt.memory.formulas import checkpointed
from leangpt.memory.run import Run
from leangpt.memory.speed import sent_bytes
from leangpt.memory.units import in_words

LOSSES = Path(__file__).with_name("losses.json")


@functools.cache
def losses() -> dict:
    """{"sizes": [model, ...], "variants": {variant: [nats against AdamW at each size, ...]}}."""
    return json.loads(LOSSES.read_text())


def given_up(run: Run, asked: Run) -> tuple[str, ...]:
    """Everything that differs from `asked` to the worse, each in a few words."""
    c, before, lost = run.config, asked.config, []
    if run.variant != asked.variant:
        lost.append(
            f"{run.variant} for {asked.variant}{loss_difference(run.variant, asked.variant)}"
        )
    if run.param_bytes < asked.param_bytes:
        lost.append("weights in bfloat16, rounded stochastically")
    if run.fused and not asked.fused:
        lost.append("weights updated inside backward, clipped by the norm of the step before")
    if run.gradient_bits and run.gradient_bits != asked.gradient_bits:
        lost.append(f"gradients summed in {run.gradient_bits} bits, without bias")
    if c.checkpoint_layers and not before.checkpoint_layers:
        lost.append(layers_again(c))
    elif tiled(c) and not tiled(before):
        lost.append("blocks by tiles, their insides computed again")
    if c.policy.recomputes and not before.policy.recomputes:
        lost.append("K and V computed again for each tile")
    if run.shares > 1 and asked.shares == 1:
        lost.append("weights gathered block by block")
    if run.context_parallel > 1 and asked.context_parallel == 1:
        lost.append(f"sequences in pieces on {run.context_parallel} processes")
    if (run.parallel, run.context_parallel) != (asked.parallel, asked.context_parallel):
        lost.append(f"{in_words(sent_bytes(run)[0])} a step sent by each process")
    if c.offload and not before.offload:
        moved = 2 * checkpointed(c) * run.tokens * c.n_embd * run.stream_bytes * run.micro_batches
        lost.append(f"{in_words(moved)} a step to the host and back")
    return tuple(lost)


def layers_again(config) -> str:
    """Which layers backward computes again, of a config that has some of them checkpointed."""
    first = checkpointed(config)
    if first == config.n_layer:
        return "every layer computed again"
    return f"the first {f'{first} layers' if first > 1 else 'layer'} computed again"


def tiled(config) -> bool:
    """Is a tile's size given, or implied?"""
    return bool(config.q_chunk or config.checkpoint_layers)


def loss_difference(variant: str, other: str) -> str:
    """ ": -0.19 / -0.04 / -0.32 nats at ...", of `variant` against `other`; "" if not measured."""
    known = losses()["variants"]
    if variant not in known or other not in known:
        return ""
    pairs = zip(known[variant], known[other])
    nats = " / ".join("?" if None in pair else f"{pair[0] - pair[1]:+.2f}" for pair in pairs)
    return f" ({nats} nats at {' / '.join(losses()['sizes'])})"


def mean_loss_difference(run: Run, other: Run) -> float:
    """Nats of the variant of `run` against that of `other`, over all sizes measured; inf: none."""
    known = losses()["variants"]
    pairs = zip(known.get(run.variant, ()), known.get(other.variant, ()))
    differences = [a - b for a, b in pairs if None not in (a, b)]
    return sum(differences) / len(differences) if differences else math.inf
