"""Commands as a work queue: one at a time on each GPU, started while there is time for them."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Job:
    """A command that runs: what it is for, where, since when."""

    run: object  # the caller's
    slot: int
    process: subprocess.Popen
    began: float = field(default_factory=time.monotonic)  # seconds

    @property
    def seconds(self):
        """Since it was started."""
        return time.monotonic() - self.began


def environment(slot, on_gpus, cache):
    """For a run in this slot: its own GPU, and a cache of compiled kernels that all runs share."""
    extra = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTHONUNBUFFERED": "1",
    }
    if on_gpus:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = given.split(",") if given else [str(number) for number in range(slot + 1)]
        extra["CUDA_VISIBLE_DEVICES"] = devices[slot]
    return os.environ | extra


def start(run, slot, command, log, env):
    """Start a command with its output in the file `log` -> Job."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, stdin=subprocess.DEVNULL
        )
    return Job(run, slot, process)


def work(slots, next_run, launch, finished, say, poll=0.5):
    """Keep `slots` commands running until there is nothing to start and none runs.

    next_run(running): the run to start now (running: those that run), or None. launch(run, slot):
    a Job. finished(job, status): called once for each, as soon as it ends. Whatever ends this
    program is passed on to the commands, and said.
    """
    jobs = []
    try:
        while True:
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                finished(job, job.process.returncode)
            free = sorted(set(range(slots)) - {job.slot for job in jobs})
            started = False
            if free:
                run = next_run([job.run for job in jobs])
                if run is not None:
                    jobs.append(launch(run, free[0]))
                    started = True
            if not jobs and not started:
                return
            if not started:
                time.sleep(poll)
    except BaseException:
        for job in jobs:
            say(f"stopping {job.run} after {job.seconds:.0f} s: it is not recorded")
            job.process.send_signal(signal.SIGTERM)
        for job in jobs:
            job.process.wait()
        raise
