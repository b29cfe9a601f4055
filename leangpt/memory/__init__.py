"""What a training run takes of memory: formulas, plans made of them, and the exact meter.

    from leangpt.memory import plan

    for found in plan(config, "24GB"):      # config: a GPTConfig
        print(found.flags, found.peak)

Names are loaded when first asked for.
"""

import importlib

_HOME = {
    "Budget": "search",
    "Plan": "search",
    "Rates": "speed",
    "Run": "run",
    "measure_peak": "meter",
    "parse_bytes": "units",
    "plan": "goals",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
