"""The commands of README, of the page on compare.py and of the systems before this one, run as
they stand in a folder of a user's; only iterations, tokens and lengths are made fewer."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = ("README.md", "docs/results/compare.md")
SEEDS = (  # verbatim
    "python bench.py --seq 1024 4096 --runs 3 --print",
    "python bench.py --seq 256 --k-chunk 256 --q-chunk 64 --kv-heads 2 --policy recompute",
    "python train.py config/train_shakespeare_char.py --optimizer_variant adamsn",
    "python train.py config/train_shakespeare_char.py --policy recompute --k-chunk 256 "
    "--q-chunk 64 --kv-heads 2",
    "python sample.py --out_dir=out-shakespeare-char --policy recompute --k-chunk 256 --q-chunk 64 "
    "--kv-heads 2",
)
FEWER = {  # of each script, so that its command takes seconds
    "train.py": "--max_iters=2 --eval_iters=1 --log_interval=1",
    "sample.py": "--num_samples=1 --max_new_tokens=5",
    "bench.py": "--seq=64 --runs=1",
    "prepare.py": "--input book.txt",  # no network
}


def commands_of(page):
    """Each line that calls one of our scripts on a machine without a GPU."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"python \S+\.py", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout of one's own: all but the data sets and runs is a link to the repository."""
    folder = tmp_path_factory.mktemp("user")
    for entry in ROOT.iterdir():
        if entry.suffix == ".py" or entry.name in ("leangpt", "config", ".git"):
            (folder / entry.name).symlink_to(entry)
    (folder / "data" / "shakespeare_char").mkdir(parents=True)
    for name in ("__init__.py", "prepare_text.py", "shakespeare_char/prepare.py"):
        (folder / "data" / name).write_bytes((ROOT / "data" / name).read_bytes())
    line = "ROMEO: But soft, what light through yonder window breaks?\n"
    (folder / "book.txt").write_text(line * 500)
    return folder


def run(folder, command, more=""):
    command = f"{command} {more}".replace("python", f'"{sys.executable}"', 1)
    return subprocess.run(
        command, shell=True, cwd=folder, text=True, capture_output=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


def fewer(command):
    return FEWER.get(command.split()[1].rpartition("/")[2], "")


@pytest.mark.slow
@pytest.mark.campaign
def test_commands_of_the_pages_run_in_their_order(folder):
    commands = [command for page in PAGES for command in commands_of(page)]
    assert len(commands) >= 10
    for command in commands:
        command = command.replace("out-shakespeare-char out-demo", "out-shakespeare-char")
        done = run(folder, command, fewer(command))
        if command.startswith("python train.py config/train_gpt2.py"):  # 54 GB to be fetched
            assert done.returncode == 2 and "is missing: run python" in done.stderr, done
        else:
            assert done.returncode == 0, (command, done.stderr)
    for variant in ("-adam", "-adamsn", ""):  # three runs in one out_dir, none lost
        assert (folder / f"out-shakespeare-char{variant}" / "ckpt.pt").exists()
    assert (folder / "compare.png").exists()


@pytest.mark.slow
def test_commands_of_the_systems_before_run_as_they_stand(folder):
    prepare = "python data/shakespeare_char/prepare.py"
    for command in (prepare, *SEEDS):
        shorter = "" if "bench.py" in command else fewer(command)
        done = run(folder, command, shorter)
        assert done.returncode == 0, (command, done.stderr)
