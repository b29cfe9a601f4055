"""One line where a run's memory did not suffice: what it takes, and the nearest that takes less.

Settings are named only where the planner's formulas say that they lower this run's peak: on a CPU,
over few tokens or in a small model many do nothing.
"""

import math

from leangpt.memory.search import Budget, predict
from leangpt.memory.units import in_words
from leangpt.training.planning import left_on_card, nearest, wish_of

LESS = 0.8  # of a run that should have fitted: what one that is named instead takes at most


def advise_oom(settings, runtime, fitted=None, config=None, flags=(), options=None) -> str:
    """What did not fit, and what would.

    settings: those that ran; fitted: of planning.py; config: of the model that was built; flags:
    names that the command line sets; options: optimizer_options as a dict. Without fitted and
    config memory ended while the model was built.
    """
    if config is None:
        return (
            f"out of memory: weights and optimizer state of {_model(settings)} do not fit, a "
            "smaller model may"
        )
    if fitted is None or fitted.plan is None:
        return f"out of memory, and nothing was predicted of this run: {_less_at_once(settings)}"
    runs = (runtime.dtype, runtime.device_type, runtime.world_size)
    wish = wish_of(settings, flags, config, options or {}, *runs)
    at_hand = fitted.at_hand  # before the run took its own
    if runtime.device_type == "cuda":  # others may have taken some since
        at_hand = min(at_hand or math.inf, left_on_card(runtime.device))
    return f"out of memory: {instead(wish, at_hand)}"


def instead(wish, at_hand: int | None) -> str:
    """One sentence: what the asked run takes by the formulas, and the fastest that would fit.

    Where by the formulas it should have fitted into at_hand bytes, what is named takes LESS of it.
    """
    asked = predict(wish.asked, wish, Budget(at_hand or 0))
    of = f" of {in_words(at_hand)} at hand" if at_hand else ""
    room = Budget(min(int(LESS * asked.peak), at_hand or asked.peak))
    return (
        f"this run takes {in_words(asked.peak)}{of} at its fullest ({asked.moment})"
        f"{nearest(asked, wish, room)}"
    )


def _less_at_once(settings):
    """What always lowers the memory of a step, as far as there is anything left of it."""
    batch, count = settings.batch_size, settings.gradient_accumulation_steps
    if batch == 1:
        return f"shorter sequences than --block_size={settings.block_size} take less"
    less = max(n for n in range(1, batch) if batch % n == 0)
    return (
        f"--batch_size={less} --gradient_accumulation_steps={count * batch // less} takes less "
        "for the same iteration"
    )


def _model(settings):
    """A run's model, in words."""
    if settings.init_from not in ("scratch", "resume", "auto"):
        return settings.init_from
    return f"a model of n_layer={settings.n_layer}, n_embd={settings.n_embd}"
