"""Ending a loop where it likes to: signals are remembered, and several processes agree."""

import signal
import time


class StopSignal:
    """`with StopSignal() as stop:` remembers a signal that asks for the end, `stop.received`.

    SIGINT (Ctrl-C), SIGTERM and, where it would end the process, SIGHUP: a terminal that goes away;
    None before. Another one has its usual effect, unless it comes within `patience` seconds: a
    Ctrl-C reaches the processes of torchrun twice.
    """

    patience = 1.0

    def __init__(self):
        self.received = None  # the signal's number
        self.usual = {}  # number -> the handler that was there before
        self.since = 0.0

    def __enter__(self):
        self.received = None
        numbers = [signal.SIGINT, signal.SIGTERM]
        # nohup has it ignored, and means it
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.usual = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def _receive(self, number, frame):
        if self.received is None:
            self.ask(number)
        elif time.monotonic() - self.since >= self.patience:
            self.__exit__()
            signal.raise_signal(number)  # to this thread: os.kill may choose another

    def ask(self, number: int) -> None:
        """As if the signal of this number had come."""
        if self.received is None:
            self.received, self.since = number, time.monotonic()

    def __exit__(self, *exception):
        for number, handler in self.usual.items():
            signal.signal(number, handler)


class Agreement:
    """`stopping()`: should the run end? Where there are several processes, all answer alike.

    Every process has to ask equally often, at the same points: before each micro-batch. They talk
    to one another about every `seconds` (one number each), or at each point where these are further
    apart: a scheduler that sends SIGTERM waits half a minute before it kills.
    """

    def __init__(self, runtime, stop: StopSignal, seconds: float = 2.0):
        self.runtime, self.stop, self.seconds = runtime, stop, seconds
        self.agreed = False
        self.calls, self.every = 0, 1  # since they last talked; after how many they talk again
        self.since = time.monotonic()

    def __call__(self) -> bool:
        if self.runtime.world_size == 1:
            return self.stop.received is not None
        self.calls += 1
        if not self.agreed and self.calls >= self.every:
            received = float(self.stop.received is not None)
            signalled, elapsed = self.runtime.mean_over_processes(
                [received, time.monotonic() - self.since]
            )
            self.agreed = signalled > 0
            # means, so the same everywhere; at most doubled, for iterations may become slower
            fitting = int(self.seconds * self.calls / max(elapsed, 1e-6))
            self.every = max(1, min(2 * self.every, fitting))
            self.calls, self.since = 0, time.monotonic()
        return self.agreed

    def again(self) -> "Agreement":
        """A new one for another loop, whose iterations take another time."""
        return Agreement(self.runtime, self.stop, self.seconds)
