import signal
from types import SimpleNamespace

import pytest

from leangpt.system import stopping
from leangpt.system.stopping import Agreement, StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_remembered(number):
    outside = signal.signal(number, signal.default_int_handler)  # under nohup one is ignored
    try:
        with StopSignal() as stop:
            assert stop.received is None
            signal.raise_signal(number)
            signal.raise_signal(number)  # at once, as torchrun passes it on
            assert stop.received == number
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, outside)


def test_a_later_signal_acts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with StopSignal() as stop:
            stop.patience = 0.0
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
    assert stop.received == signal.SIGTERM and signal.getsignal(signal.SIGINT) == before


def test_nohup_keeps_its_meaning():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


class Processes:
    """Two of them as one sees them, by a clock of its own; the other one got a signal at `when`."""

    world_size = 2

    def __init__(self, monkeypatch, when):
        self.now, self.when, self.talks = 0.0, when, []
        monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: self.now))

    def mean_over_processes(self, values):
        self.talks.append(self.now)
        signalled, elapsed = values
        return [(signalled + (self.now >= self.when)) / 2, elapsed]


@pytest.mark.parametrize("seconds", [0.001, 0.3, 7.0])
def test_processes_agree_within_seconds_whatever_an_iteration_takes(monkeypatch, seconds):
    processes = Processes(monkeypatch, when=100.0)
    stop = Agreement(processes, StopSignal())
    while not stop():
        processes.now += seconds
        assert processes.now < 200
    assert 100.0 <= processes.now <= 100.0 + max(2.5, seconds)
    assert len(processes.talks) <= 100 / max(seconds, 1.5) + 15
    assert stop()  # without another word
    assert stop() and processes.talks[-1] <= processes.now


def test_iterations_that_become_slow_are_noticed(monkeypatch):
    """A thousand a second, then one in two seconds."""
    processes = Processes(monkeypatch, when=100.0)
    stop = Agreement(processes, StopSignal())
    for _ in range(20_000):
        assert not stop()
        processes.now += 0.001
    stop = stop.again()
    while not stop():
        processes.now += 2.0
        assert processes.now < 200
    assert processes.now <= 104.0


def test_one_process_asks_nobody():
    stop = StopSignal()
    agreement = Agreement(SimpleNamespace(world_size=1), stop)
    assert not agreement()
    stop.received = signal.SIGTERM
    assert agreement()
