"""Long work shows how far it is: a bar on a terminal, in a log a plain line now and then."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

SHORT = 3.0  # seconds that need no bar
EVERY = 30.0  # seconds between lines of a log


def progress(
    items: Iterable, what: str, total: int, unit: str = "batches", shown: bool = True
) -> Iterator:
    """Yield `items`, `total` in all, and say on stderr how many are done and what time is left.

    what: in words, "evaluating". shown: False in the processes that say nothing.
    """
    if not shown:
        yield from items
    elif (bar := _bar(what, total, unit)) is not None:
        with bar:
            for item in items:
                yield item
                bar.update()
    else:
        yield from _lines(items, what, total, unit)


def _bar(what, total, unit):
    """tqdm's, where there is a terminal and tqdm."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(desc=what, total=total, unit=f" {unit}", leave=False, delay=SHORT, ncols=80)


def _lines(items, what, total, unit):
    began = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= EVERY:
            left = timedelta(seconds=round((now - began) / done * (total - done)))
            said = now
            with contextlib.suppress(OSError):  # a full disk: no reason to end the work
                words = f"{what}: {done:,} of {total:,} {unit}, {left} left"
                print(words, file=sys.stderr, flush=True)
        yield item
