"""Command lines drawn at random: every script, settings in and out of range, in any number."""

import random
import string
from dataclasses import fields

import bench
import compare
import plan
import sample
import train
from data import prepare_text
from experiments.reliability.world import GREEDY, TINY
from experiments.reliability.zygote import run

COUNT = 3500
PLANS = 3000  # from this case on every line is plan.py's, which came later
NEEDED = ("data", "out", "adam", "llama", "int4.safetensors", "book.txt")
SCRIPTS = {  # script -> (weight, its settings, what a line begins with)
    "train.py": (50, train.Settings, (*TINY, "--max_iters=2")),
    "sample.py": (30, sample.Settings, GREEDY),
    "compare.py": (8, compare.Settings, ("out", "adam")),
    "bench.py": (2, bench.Settings, ("--seq=16", "--d_model=32", "--heads=2", "--runs=1")),
    "data/prepare_text.py": (
        9,
        prepare_text.Settings,
        ("--input=book.txt", "--name=new", "--data_dir=data"),
    ),
    "optimizers.py": (1, None, ()),
}
PLAN = ("plan.py", plan.Settings, (*TINY, "--device=cpu", "--memory=1GB"))
WISHES = ("24GB", "1 GiB", "3cows", "fastest", "longest", "largest", "sample", "llama", "64", "99")
STRANGE = (
    *("", " ", "0", "-1", "1", "2", "3", "7", "16", "0.5", "-0.0", "1e-320", "1e400", "-1e400"),
    *("nan", "inf", "None", "True", "no", "x", "1,2", "1, x", ",", "--", "=", "a=b", "..", "."),
    *("/dev/null/x", "/dev/null", "/proc/1/mem", "9" * 30, "9" * 5000, str(2**63 - 1), "1e18"),
    *(str(-(2**63)), "x" * 300, "x" * 5000, "é", "0x10", "1_000", "１２", "[1]", "{", "%s", "\n"),
    *("$HOME", "out", "adam", "llama", "int4.safetensors", "book.txt", "data", "FILE:book.txt"),
    *("FILE:data", "cache", "recompute", "grouped", "adamsn8", "muonsn4", "bfloat16", "float16"),
    *("cuda", "cpu", "mps", "rope", "none", "auto", "resume", "scratch", "once", "linear", "gpt2"),
    *("out/ckpt.pt", "nu=0.9", "momentum_bits=4", "fused_backward=True", "clip=1", "ns_steps=0"),
)


def count(world):
    return COUNT


def case(number, world, real):
    """One case -> a row's cells."""
    choose = random.Random(f"lines {number}")
    if number >= PLANS:
        (script, settings, base), values = PLAN, STRANGE + 6 * WISHES
    else:
        weights = [weight for weight, *_ in SCRIPTS.values()]
        script = choose.choices(list(SCRIPTS), weights)[0]
        (_, settings, base), values = SCRIPTS[script], STRANGE
    words = draw(choose, settings, base, values)
    folder = world.case_folder(number, *NEEDED)
    ended = run([script, *words], folder, real=real)
    world.forget(folder)
    said = " ".join(word if len(word) < 40 else f"{word[:30]}..." for word in words[len(base) :])
    cells = {"kind": script, "what": said, "outcome": ended.verdict, "detail": ended.words}
    return cells | {"status": ended.status, "seconds": round(ended.seconds, 2)}


def draw(choose, settings, base, values=STRANGE):
    """The words of a line: some of what makes it small, then a few settings at random."""
    words = list(base)
    if choose.random() < 0.02 and settings is not train.Settings:  # whose defaults take days
        words = words[: choose.randint(0, len(words))]
    names = [field.name for field in fields(settings)] if settings else ["out"]
    for _ in range(choose.randint(0, 4)):
        name, value = choose.choice(names), choose.choice(values)
        if choose.random() < 0.03:
            name = "".join(choose.choices(string.printable, k=choose.randint(0, 8)))
        dashes = choose.choice(["--"] * 8 + ["-", ""])
        words += choose.choice(
            [[f"{dashes}{name}={value}"]] * 4
            + [[f"{dashes}{name}", value], [f"{dashes}{name}"], [value]]
        )
    return [word.replace("\0", "") for word in words]
