"""Kills: a run ended at random moments and taken up again must be the run that was never ended."""

import contextlib
import json
import random
from pathlib import Path

from experiments.reliability.processes import run_in
from experiments.reliability.world import GREEDY, TINY, leftovers, run_result, said
from experiments.reliability.zygote import Child, run
from leangpt.optim import VARIANTS
from leangpt.system.errors import UserError

COUNT, EARLIER = 1200, 1000  # cases; of these kinds that were there from the beginning
RUN = (*TINY, "--max_iters=6", "--eval_interval=1", "--eval_iters=1", "--dropout=0.1")
KINDS = {  # of runs -> their flags
    "plain": (),
    "accumulation": ("--gradient_accumulation_steps=2", "--always_save_checkpoint=True"),
    "one pass": ("--data_order=once",),
    "tiles": ("--attention_policy=recompute", "--q_chunk=4", "--dropout=0", "--checkpoint_layers"),
    "low byte": ("--param_dtype=bfloat16", "--optimizer_options=fused_backward=True"),
    "two processes": ("--gradient_accumulation_steps=2", "--parallel=ddp"),
    "two sharded": ("--gradient_accumulation_steps=2", "--parallel=fsdp", "--n_embd=32"),
}
PIECES = ("--context_parallel=2", "--position=rope", "--dropout=0")
LATER = {
    "sequences in pieces": ("--parallel=ddp", *PIECES),
    "pieces and shards": ("--parallel=fsdp", "--n_embd=32", *PIECES),
}
WRITERS = {  # what else writes -> (its command, what reads it, what it writes)
    "prepare": (
        ["data/prepare_text.py", "--input=other.txt", "--name=tiny", "--data_dir=data"],
        ["train.py", *TINY, "--out_dir=read", "--max_iters=1", "--eval_iters=1"],
        "data/tiny",
    ),
    "export": (
        ["sample.py", "--init_from=llama", "--export=exported"],
        ["sample.py", "--init_from=exported", "--start=hello", *GREEDY],
        "exported",
    ),
    "4 bits": (
        ["sample.py", "--out_dir=wide", "--int4", "--save_int4=new.safetensors", *GREEDY],
        ["sample.py", "--init_from=new.safetensors", "--start=the", *GREEDY],
        "new.safetensors",
    ),
}


def count(world):
    return COUNT


def case(number, world, real):
    """One case -> a row's cells."""
    choose = random.Random(f"kills {number}")
    if number < EARLIER and choose.random() < 0.1:
        return writer_case(choose, world, number, real)
    variant = choose.choice(list(VARIANTS))
    if number < EARLIER:
        kind = choose.choice([k for k in KINDS if k != "low byte" or variant != "adam"])
    else:
        kind = list(LATER)[number % len(LATER)]
    own = (KINDS | LATER)[kind]
    flags = [*RUN, *own, f"--optimizer_variant={variant}", "--init_from=auto"]
    processes = 2 if kind.startswith("two") or kind in LATER else 1
    want, seconds = world.once(
        (kind, variant, real), lambda: reference(world, flags, processes, real)
    )
    folder = world.case_folder(number, "data")
    signals = [choose.choice((9, 9, 9, 9, 15, 2, 1)) for _ in range(choose.choice((1, 1, 2, 3)))]
    outcome, detail, total = "same", "", 0.0
    for number_of_signal in signals:
        delay = choose.uniform(0, 1.1 * seconds)
        ended = run_in(processes, ["train.py", *flags], folder, real, delay, number_of_signal)
        total += ended.seconds
        bad = ended.verdict in ("traceback", "hang", "wordy") and number_of_signal != 2
        if bad and processes == 1:
            outcome, detail = ended.verdict, ended.words
    ended = run_in(processes, ["train.py", *flags], folder, real)
    if ended.verdict != "done":
        outcome, detail = "lost", f"{ended.verdict}: {ended.words}"
    elif outcome == "same":
        outcome, detail = judged(folder, want)
    world.forget(folder)
    what = f"{variant}; signals {' '.join(map(str, signals))}"
    cells = {"kind": kind, "what": what, "outcome": outcome, "detail": detail}
    return cells | {"status": ended.status, "seconds": round(total + ended.seconds, 2)}


def judged(folder, want):
    try:
        found = run_result(folder / "out")
    except (UserError, OSError) as error:
        return "lost", str(error)
    if found != want:
        part = "metrics.csv" if found[0] != want[0] else "a checkpoint"
        return "other", f"{part} is not that of a run without kills"
    left = leftovers(folder)
    return ("litter", ", ".join(left)) if left else ("same", "")


def reference(world, flags, processes, real):
    """(what a run that nobody kills comes to, seconds it takes)."""
    folder = world.case_folder("reference", "data")
    ended = run_in(processes, ["train.py", *flags], folder, real)
    if ended.status:
        raise RuntimeError(f"{flags}: {ended.err}")
    result = run_result(folder / "out")
    world.forget(folder)
    return result, ended.seconds


def writer_case(choose, world, number, real):
    """A prepare, an export or a 4-bit save that is killed: what reads its output afterwards gets
    all of it, all of what was there before, or is refused; and it can be done again."""
    kind = choose.choice(list(WRITERS))
    write, read, output = WRITERS[kind]
    needed = ("data", "llama", "wide", "other.txt")

    def whole():
        folder = world.case_folder("reference", *needed)
        before = read_words(run(read, folder)) if kind == "prepare" else None
        world.forget(folder / "read")
        ended = run(write, folder, real=real)
        after = contents(folder / output)
        words = read_words(run(read, folder))
        world.forget(folder)
        return before, words, after, ended.seconds

    before, after, bytes_after, seconds = world.once(("writer", kind, real), whole)
    folder = world.case_folder(number, *needed)
    ended = Child(write, folder, real=real).end_in(choose.uniform(0, 1.1 * seconds), 9)
    reading = run(read, folder)
    outcome, detail = "same", ""
    if reading.verdict not in ("done", "refused"):
        outcome, detail = reading.verdict, reading.words
    elif reading.status == 0 and read_words(reading) not in (before, after):
        outcome, detail = "other", "what was read is neither the old nor the new"
    again = run(write, folder, real=real)  # as the first: other threads round otherwise
    if outcome == "same" and (again.status or contents(folder / output) != bytes_after):
        outcome, detail = "lost", f"done again it differs: {again.words}"
    world.forget(folder)
    cells = {"kind": kind, "what": "killed once", "outcome": outcome, "detail": detail}
    return cells | {"status": ended.status, "seconds": round(ended.seconds, 2)}


def read_words(ended):
    return ended.status, said(ended.out)


def contents(path):
    """name -> bytes of a file, or of the files of a folder that count."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {f.name: meaning(f) for f in files if f.is_file() and f.suffix != ".tmp"}


def meaning(file):
    """A file's bytes; of safetensors the header parsed, whose entries come in no fixed order."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        size = 8 + int.from_bytes(content[:8], "little")
        with contextlib.suppress(ValueError):  # a file that was cut
            return json.loads(content[8:size]), content[size:]
    return content
