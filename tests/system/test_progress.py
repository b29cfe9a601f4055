"""Long work says how far it is; short work says nothing."""

import io
import sys

from leangpt.system import progress as module
from leangpt.system.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(monkeypatch, stream, clock=None, shown=True):
    """What ten items are said to be, an item taking clock() seconds."""
    monkeypatch.setattr(sys, "stderr", stream)
    if clock:
        monkeypatch.setattr(module.time, "monotonic", clock)
    assert list(progress(iter(range(10)), "evaluating val", 10, shown=shown)) == list(range(10))
    return stream.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    seconds = iter(range(0, 1000, 20))
    said = run(monkeypatch, io.StringIO(), clock=lambda: next(seconds)).splitlines()
    assert said[0] == "evaluating val: 1 of 10 batches, 0:06:00 left"  # 40 s after the beginning
    assert len(said) == 5 and said[-1].startswith("evaluating val: 9 of 10 batches")


def test_short_work_and_other_processes_say_nothing(monkeypatch):
    assert run(monkeypatch, io.StringIO()) == ""
    assert run(monkeypatch, Terminal()) == ""
    seconds = iter(range(0, 1000, 20))
    assert run(monkeypatch, io.StringIO(), lambda: next(seconds), shown=False) == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(module, "SHORT", 0)
    assert "evaluating val" in run(monkeypatch, Terminal())
