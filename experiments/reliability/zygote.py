"""Scripts as children of a process that has torch imported: a tenth of a second each, not three.

A child is forked, given a folder, its arguments and files for its output, and runs the script's
main as the interpreter would. A few are started as programs of their own instead (`real`), to see
that this makes no difference. The parent computes nothing with torch, so that it has no threads.
"""

import contextlib
import gc
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import jinja2.sandbox  # noqa: F401  what children would import, each again
import matplotlib.backends.backend_agg  # noqa: F401
import safetensors.torch  # noqa: F401
import tiktoken  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
import torch.distributed.fsdp  # noqa: F401

import bench
import compare
import optimizers
import plan
import sample
import train
from data import prepare_chat, prepare_text
from data.openwebtext import prepare as prepare_documents
from experiments.shared.common import ROOT
from leangpt.system.errors import exit_cleanly
from leangpt.system.runtime import run_script

SCRIPTS = {
    "train.py": lambda: run_script(train.main),
    "sample.py": lambda: exit_cleanly(sample.main),
    "bench.py": lambda: exit_cleanly(bench.main),
    "compare.py": lambda: exit_cleanly(compare.main),
    "plan.py": lambda: exit_cleanly(plan.main),
    "optimizers.py": lambda: exit_cleanly(lambda: print(optimizers.variant_table())),
    "data/prepare_chat.py": lambda: exit_cleanly(prepare_chat.main),
    "data/prepare_text.py": lambda: exit_cleanly(prepare_text.main),
    "data/openwebtext/prepare.py": lambda: exit_cleanly(prepare_documents.main),
}
torch.set_num_threads(1)  # two on a busy machine wait for each other
QUIET = 30.0  # seconds without a word after which a child hangs
LONGEST = 45.0  # seconds that one may go on for
ROOM = 4 * 2**30  # bytes of addresses beyond those that a child begins with
ENVIRONMENT = {  # no network, one thread
    "HF_HUB_OFFLINE": "1",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}


@dataclass
class Ended:
    """How a child ended."""

    status: int  # its exit status; minus the number of the signal that ended it
    out: str
    err: str
    seconds: float
    state: str = "ended"  # or "hangs", "runs on": it was ended by us

    @property
    def verdict(self) -> str:
        """done, refused, stopped, runs on; or what must not be: traceback, crash, hang, wordy."""
        if "Traceback (most recent call last)" in self.err:
            return "traceback"
        if self.state != "ended":
            return {"hangs": "hang"}.get(self.state, self.state)
        if self.status < 0 or self.status > 143:
            return "crash"
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if self.status in (1, 2) and len(lines) != 1 or self.status == 0 and lines:
            return "wordy"
        return {0: "done", 2: "refused"}.get(self.status, "stopped")

    @property
    def words(self) -> str:
        """The last line it said on stderr."""
        lines = self.err.strip().splitlines()
        return lines[-1][:300] if lines else ""


class Child:
    """A script that runs in `folder`, its output in files beside `folder`."""

    def __init__(self, words, folder, real=False, before=None, **environment):
        """words: the script and its arguments. before: called in the child at its start."""
        self.folder = Path(folder)
        self.files = [self.folder.with_name(f"{self.folder.name}.{n}") for n in ("out", "err")]
        for file in self.files:
            file.write_bytes(b"")
        self.began = time.monotonic()
        sys.stdout.flush()
        gc.freeze()  # what there is now is not the child's to walk through
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, real, before, environment)

    def _run(self, words, real, before, environment):
        status = 70
        try:
            os.setsid()
            for number, file in enumerate(self.files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
            os.chdir(self.folder)
            os.environ.update(ENVIRONMENT | environment)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            script, *arguments = words
            if real:
                path = str(ROOT / script)
                os.execv(sys.executable, [sys.executable, path, *arguments])
            sys.argv = [script, *arguments]
            limit_addresses()
            if before is not None:
                before()
            status = run_as_a_program(SCRIPTS[script])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def end_in(self, seconds, number=signal.SIGKILL):
        """Wait so long, send the signal if the child still runs, and wait for its end."""
        if not self._ended_within(seconds):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
        return self.wait()

    def wait(self) -> Ended:
        """Its end, for which a child that is silent for too long or has no end is killed."""
        state, said, since = "ended", -1, time.monotonic()
        while not self._ended_within(1.0):
            now, size = time.monotonic(), sum(file.stat().st_size for file in self.files)
            if size != said:
                said, since = size, now
            if now - since > QUIET or now - self.began > LONGEST:
                state = "hangs" if now - since > QUIET else "runs on"
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                while not self._ended_within(1.0):
                    pass
                break
        seconds = time.monotonic() - self.began
        with contextlib.suppress(ProcessLookupError):  # what it may have left behind
            os.killpg(self.pid, signal.SIGKILL)
        out, err = (file.read_text(errors="replace") for file in self.files)
        return Ended(os.waitstatus_to_exitcode(self.status), out, err, seconds, state)

    def _ended_within(self, seconds):
        end = time.monotonic() + seconds
        while True:
            if hasattr(self, "status"):
                return True
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
            elif time.monotonic() >= end:
                return False
            else:
                time.sleep(min(0.005, max(0.0, end - time.monotonic())))


def run(words, folder, **options) -> Ended:
    """A script from its start to its end."""
    return Child(words, folder, **options).wait()


def run_as_a_program(main) -> int:
    """Exit status of what runs as a script's last lines would."""
    status = 0
    try:
        main()
    except SystemExit as leaving:
        status = leaving.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = 120  # as Python has it
    return (status or 0) & 255


def limit_addresses():
    """Memory that is not there is an error of this process alone."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
