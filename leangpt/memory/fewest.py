"""A plan with those changes alone that it needs: what advice names, one setting after another."""

import contextlib
from dataclasses import replace

from leangpt.memory.run import Run
from leangpt.memory.search import Budget, Plan, Wish, fits, predict
from leangpt.system.errors import UserError

OF_THE_CONFIG = (
    "offload checkpoint_first checkpoint_layers k_chunk q_chunk attention_policy".split()
)

FREEING = ("fused_backward", "gradient_bits")  # what becomes of gradients


def with_fewest_changes(found: Plan, wish: Wish, budget: Budget) -> Plan:
    """The plan, as asked wherever it fits without a change; each that is left lowers its peak.

    What changes the learning goes back first, then what changes how a step is computed.
    """
    run = found.run
    for name in ("param_dtype", "optimizer_options", "optimizer_variant", *OF_THE_CONFIG, "batch"):
        with contextlib.suppress(UserError):  # settings that do not go together
            before = _as_asked(run, wish.asked, name)
            if before != run and before.tensors and fits(before, budget):
                run = before
    return predict(run, wish, budget)


def _as_asked(run: Run, asked: Run, name: str) -> Run:
    """The run with one of its settings as it was asked for. Raises UserError where it cannot be."""
    if name == "batch":
        return replace(run, batch_size=asked.batch_size, micro_batches=asked.micro_batches)
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
