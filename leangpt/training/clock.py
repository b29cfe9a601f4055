"""Seconds spent training."""

import time


class StepClock:
    """Seconds spent training, with the device's work included; stopped for everything else."""

    def __init__(self, runtime, iteration: int = 0, seconds: float = 0.0):
        """Goes on from `seconds` after `iteration` iterations; stands until `start`."""
        self.runtime, self.total, self.since = runtime, seconds, None
        self.lap_began = iteration, seconds

    def start(self):
        self.runtime.synchronize()
        self.since = time.perf_counter()

    def read(self) -> float:
        """Seconds so far; waits for the device."""
        self.runtime.synchronize()
        now = time.perf_counter()
        if self.since is not None:
            self.total += now - self.since
            self.since = now
        return self.total

    def stop(self):
        self.read()
        self.since = None

    def lap(self, iteration: int) -> float:
        """Mean seconds of an iteration since the last lap; `iteration` of them are done now."""
        then, seconds_then = self.lap_began
        self.lap_began = iteration, self.read()
        return (self.total - seconds_then) / (iteration - then)
