"""The fast tests as other processors would run them: `python tests/run_processors.py`.

    python tests/run_processors.py --only lowest --folders layers int4
    python tests/run_processors.py --seeds 10 --marker "" --only 1-thread  # slow tests, ten orders

PyTorch, oneDNN and MKL choose their kernels by the processor; environment variables hold each of
them down. Our own C kernels are built for a lower processor by a `cc` of this script's that stands
before the real one in PATH. Every pass is one process of pytest for each folder of tests/, in a
random order that the printed seed gives again. Exits with 1 where anything failed.

Above what the processor has nothing can be tried: on another machine, other passes mean something.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")
COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++", "c99", "c89")
MARCH = "LEANGPT_TESTS_MARCH"  # read by compiler_for alone
LOWEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    MARCH: "x86-64",
}
PASSES = {  # name -> environment
    "lowest": LOWEST,
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2", MARCH: "x86-64-v3"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "onednn-avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "mkl-avx512": {"MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "1-thread": {"OMP_NUM_THREADS": "1"},
    "2-threads": {"OMP_NUM_THREADS": "2"},
    "4-threads": {"OMP_NUM_THREADS": "4"},
    "no-compiler": {"PATH": ""},
}
X86_ONLY = [name for name in PASSES if "threads" not in name and name != "no-compiler"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folders = sorted(path.parent.name for path in TESTS.glob("*/test_*.py"))
    folders = sorted({*folders, *(path.parent.parent.name for path in TESTS.glob("*/*/test_*.py"))})
    parser.add_argument("--only", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--folders", nargs="+", default=folders, help="of tests/, or files in it")
    parser.add_argument("--marker", default="not slow", help="pytest's -m; '' for all tests")
    parser.add_argument("--seeds", type=int, default=1, help="orders to try in each pass")
    parser.add_argument("--first-seed", type=int, default=0)
    given = parser.parse_args()
    names = [name for name in given.only if X86 or name not in X86_ONLY]
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            environment = environment_of(name, Path(scratch) / name)
            for seed in range(given.first_seed, given.first_seed + given.seeds):
                for folder in given.folders:
                    status = run(folder, given.marker, seed, environment, name)
                    if status:
                        failed.append(f"{name}, seed {seed}: {folder}")
    print("\n".join(["failed:", *failed]) if failed else "all passed")
    sys.exit(bool(failed))


def environment_of(name, scratch):
    """What a pass sets -> the whole environment of its processes. scratch: a folder for it."""
    scratch.mkdir()
    changes = dict(PASSES[name])
    march = changes.pop(MARCH, None)
    environment = os.environ | changes
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment["PYTHONPATH"] = str(TESTS)
    if march or name == "no-compiler":
        environment["LEANGPT_CACHE"] = str(scratch / "cache")
    if march:
        compiler_for(march, scratch)
        environment["PATH"] = f"{scratch}{os.pathsep}{os.environ['PATH']}"
    if name == "no-compiler":
        environment["PATH"] = path_without_compilers(scratch / "bin")
    return environment


def compiler_for(march, folder):
    """A `cc` in `folder` that builds for the processor `march` where it is asked for this one."""
    real = shutil.which("cc")
    if real is None:
        return
    script = folder / "cc"
    script.write_text(
        "#!/usr/bin/env python3\nimport os, sys\n"
        f"words = [w.replace('-march=native', '-march={march}') for w in sys.argv[1:]]\n"
        f"os.execv({real!r}, [{real!r}, *words])\n"
    )
    script.chmod(0o755)


def path_without_compilers(folder):
    """PATH's programs but the compilers, as links in `folder` -> the PATH that has only it."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*") if place else ():
            compiler = program.name.startswith(COMPILERS) or "-gcc" in program.name
            link = folder / program.name
            if not compiler and not link.is_symlink():
                link.symlink_to(program.absolute())
    return str(folder)


def run(folder, marker, seed, environment, name):
    """Run the tests of one folder -> pytest's exit status, 0 where there is none to run."""
    command = [sys.executable, "-m", "pytest", "-p", "shuffled", "-p", "no:cacheprovider"]
    command += ["-m", marker, str(TESTS / folder)]
    began = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env=environment | {"SHUFFLE_SEED": str(seed)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    status = 0 if done.returncode == 5 else done.returncode  # 5: every test has another marker
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    seconds = time.perf_counter() - began
    print(f"{name:<14} seed {seed} {folder:<12} {seconds:5.0f} s  status {status}: {last}")
    if status:
        print(done.stdout, flush=True)
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    main()
