"""Faults: whatever a program asks of the operating system while it saves may be refused.

faults.c stands between a child and libc and lets one call on the case's folder fail, or one and all
later of its kind, as a full disk does; or write half of what it should. Afterwards nothing may be
lost that was there before, and the same command must do what it did not.
"""

import ctypes
import errno
import os
import random
import sys
from pathlib import Path

from experiments.reliability.kills import contents
from experiments.reliability.world import GREEDY, TINY, leftovers, run_result, said
from experiments.reliability.zygote import Child, run
from leangpt.runs.checkpoint import checkpoint_to_resume, load_checkpoint
from leangpt.system import c_library
from leangpt.system.cache import cache_folder
from leangpt.system.errors import UserError

LEAST = 229  # cases of a scenario; more where it makes more calls: each fails once
SOURCE = Path(__file__).with_suffix(".c")
RUN = (*TINY, "--eval_interval=1", "--eval_iters=1")
MODEL = ("llama", "wide", "data")
SCENARIOS = {  # what is written -> (command, what there is before, its output, what reads that)
    "first save": (["train.py", *RUN, "--max_iters=2", "--out_dir=new"], ("data",), "new", None),
    "later saves": (
        ["train.py", "--init_from=resume", "--max_iters=6", "--eval_interval=1"],
        ("data", "out"),
        "out",
        None,
    ),
    "moved aside": (["train.py", *RUN, "--max_iters=1"], ("data", "out"), "out", None),
    "export": (
        ["sample.py", "--init_from=llama", "--export=exported"],
        MODEL,
        "exported",
        ["sample.py", "--init_from=exported", "--start=hello", *GREEDY],
    ),
    "4-bit save": (
        ["sample.py", "--out_dir=wide", "--int4", "--save_int4=new.safetensors", *GREEDY],
        MODEL,
        "new.safetensors",
        ["sample.py", "--init_from=new.safetensors", "--start=the", *GREEDY],
    ),
    "prepare": (
        ["data/prepare_text.py", "--input=other.txt", "--name=tiny", "--data_dir=data"],
        ("data", "other.txt"),
        "data/tiny",
        ["train.py", *TINY, "--out_dir=read", "--max_iters=1", "--eval_iters=1"],
    ),
    "comparison": (["compare.py", "out", "adam", "--csv=x.csv"], ("out", "adam"), "x.csv", None),
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
ERRORS = {  # kind of call -> what it may fail with; 0: half is written
    "write": (*FULL, 0),
    "pwrite": (*FULL, 0),
    "sendfile": (*FULL, 0),
    "open-to-write": (errno.EACCES, errno.EMFILE, *FULL),
    "open": (errno.EACCES, errno.EMFILE, errno.EIO),
    "opendir": (errno.EACCES, errno.EMFILE),
    "mkdir": (errno.EACCES, errno.EROFS, *FULL),
    "rename": (errno.EACCES, *FULL),
    "unlink": (errno.EACCES, errno.EROFS, errno.EIO),
    "flock": (errno.ENOLCK, errno.EIO, errno.EINTR),
    "read": (errno.EIO,),
    "stat": (errno.EACCES, errno.EIO, errno.ESTALE),
    "lstat": (errno.EACCES, errno.EIO, errno.ESTALE),
    "fstat": (errno.EIO, errno.ESTALE),
    "mmap": (errno.ENOMEM, errno.EACCES, errno.ENODEV),
}


def load_before_everything_else():
    """Start this program again with faults.c before libc, if it is not there."""
    path = cache_folder() / "faults.so"
    if os.environ.get("LD_PRELOAD") == str(path):
        return
    c_library.build(SOURCE, ("-O1", "-fPIC"), path)
    os.environ["LD_PRELOAD"] = str(path)
    os.execv(sys.executable, sys.orig_argv)


def arm(folder, nth, error, sticky=False):
    """Called in a child: what faults.c's faults_arm does."""
    ctypes.CDLL(None).faults_arm(os.fsencode(folder), ctypes.c_long(nth), error, int(sticky))


def count(world):
    return len(places(world))


def places(world):
    """(scenario, number of the call that fails) of each case, in an order drawn once."""
    return world.once("places", lambda: _places(world))


def _places(world):
    drawn = []
    for kind in SCENARIOS:
        calls, _ = undisturbed(kind, world)
        cases = max(LEAST, len(calls))
        drawn += [(kind, 1 + number * len(calls) // cases) for number in range(cases)]
    random.Random("faults").shuffle(drawn)
    return drawn


def undisturbed(kind, world):
    return world.once(("faults", kind), lambda: reference(kind, world))


def case(number, world, real=False):
    """One case -> a row's cells."""
    kind, nth = places(world)[number]
    choose = random.Random(f"faults {number}")
    calls, want = undisturbed(kind, world)
    call = calls[nth - 1]
    error = choose.choice(ERRORS.get(call.removesuffix("64"), (errno.EIO,)))
    sticky = choose.random() < 0.4
    sticky = sticky and error != errno.EINTR  # which every caller answers by trying again
    command, needed, output, reader = SCENARIOS[kind]
    folder = world.case_folder(number, *needed)
    ended = Child(command, folder, before=lambda: arm(folder, nth, error, sticky)).wait()
    keeps = sticky and call in ("unlink", "fstat", "fstat64")  # no lock's file can be removed
    outcome, detail = judged(kind, ended, folder, world, want, keeps)
    named = errno.errorcode.get(error, "half")
    what = f"{call} {nth} of {len(calls)}: {named}{', and later' if sticky else ''}"
    world.forget(folder)
    cells = {"kind": kind, "what": what, "outcome": outcome, "detail": detail or ended.words}
    return cells | {"status": ended.status, "seconds": round(ended.seconds, 2)}


def judged(kind, ended, folder, world, want, keeps):
    """(outcome, detail) of a command that met a fault: as it ended, what is left, what it does when
    it is given again. keeps: is no file removed, a lock's neither?"""
    if ended.verdict not in ("done", "refused", "stopped"):
        return ended.verdict, ended.words
    command, _, output, reader = SCENARIOS[kind]
    if kind == "later saves":
        try:
            if load_checkpoint(checkpoint_to_resume(folder / "out"))["iter_num"] < 4:
                return "lost", "the checkpoint is an older one"
        except UserError as error:
            return "lost", str(error)
    if kind == "moved aside" and not earlier_run(folder, world):
        return "lost", "the earlier run is nowhere"
    if reader and not (ended.status == 0 and kind == "prepare"):
        before, after = want["read before"], want["read"]
        reading = run(reader, folder)
        words = reading.status, said(reading.out)
        if reading.status == 0 and words not in (before, after):
            return "other", "what is read is neither the old nor the new"
        if reading.verdict not in ("done", "refused"):
            return reading.verdict, f"when it is read: {reading.words}"
    if ended.status == 0 and found(kind, folder / output) == want["written"]:
        return "same", ""
    if ended.status == 0 and kind != "comparison":
        return "other", "it ended well, and wrote something else"
    again = [word for word in command if not word.startswith("--init_from=r")]
    again += ["--init_from=auto"] * (kind in ("first save", "later saves"))
    repeated = run(again, folder)
    if repeated.status or found(kind, folder / output) != want["written"]:
        return "lost", f"again: {repeated.words or 'other results'}"
    # a lock's file that the system lets nobody remove holds nobody off
    left = [name for name in leftovers(folder) if name.endswith(".lock") and not keeps]
    return ("litter", ", ".join(left)) if left else (ended.verdict, "")


def reference(kind, world):
    """(names of the calls that a command makes, what it comes to where none fails)."""
    command, needed, output, reader = SCENARIOS[kind]
    folder = world.case_folder("reference", *needed)
    want = {}
    if reader:
        reading = run(reader, folder)
        want["read before"] = reading.status, said(reading.out)
        world.forget(folder)
        folder = world.case_folder("reference", *needed)
    file = folder.with_name("calls")

    def counting():
        arm(folder, 0, 0)
        exit_now = os._exit

        def leave(status):
            library = ctypes.CDLL(None)
            library.faults_names.restype = ctypes.c_char_p
            file.write_bytes(library.faults_names())
            exit_now(status)

        os._exit = leave

    ended = Child(command, folder, before=counting).wait()
    if ended.status:
        raise RuntimeError(f"{kind}: {ended.err}")
    want["written"] = found(kind, folder / output)
    if reader:
        reading = run(reader, folder)
        want["read"] = reading.status, said(reading.out)
    world.forget(folder)
    return file.read_text().split(), want


def found(kind, path):
    """What a command wrote, in a form that compares; None where that is no whole output."""
    try:
        if kind in ("first save", "later saves", "moved aside"):
            return run_result(path)
        return contents(path)
    except (UserError, OSError):
        return None


def earlier_run(folder, world):
    """Is the run that was in out_dir still somewhere, byte for byte?"""
    whole = contents(world.pristine / "out")
    places = [
        place for place in folder.iterdir() if place.is_dir() and place.name.startswith("out")
    ]
    return any(whole.items() <= contents(place).items() for place in places)
