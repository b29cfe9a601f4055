"""Files written whole or not at all: full disks, folders that cannot be, older files."""

import contextlib
import os
import resource

import pytest
import torch

from experiments.shared.common import write_csv
from leangpt.runs.metrics import MetricsFile
from leangpt.runs.run import write_json
from leangpt.system.errors import UserError
from leangpt.system.whole_files import write_whole, written_whole
from leangpt.text.folder import write_dataset
from leangpt.weights.export import export_pretrained
from model import GPT, GPTConfig


@contextlib.contextmanager
def full_disk(room=64):
    """No file can grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tiny_gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))


WRITERS = {
    "csv": lambda folder: write_csv(folder / "a.csv", [{"a": "x" * 100}]),
    "settings": lambda folder: write_json(folder / "config.json", {"a": "x" * 100}),
    "bytes": lambda folder: write_whole(folder / "a.bin", b"x" * 100),
    "dataset": lambda folder: write_dataset(
        folder, [0] * 99, [0] * 99, {"tokenizer": "gpt2", "vocab_size": 50257}
    ),
    "export": lambda folder: export_pretrained(tiny_gpt(), folder),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_the_older_files_and_one_line(write, tmp_path):
    folder = tmp_path / "new"
    with full_disk(), pytest.raises(UserError, match="^cannot write .*File too large"):
        write(folder)
    assert not [path for path in folder.iterdir() if path.name != "train.bin"]
    write(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with full_disk(), pytest.raises(UserError):
        write(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after == {name: before[name] for name in after}  # a dataset loses its meta.json first
    assert after == before or "meta.json" in before


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_cannot_be_is_one_line(write, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="^(cannot write|export: )") as caught:
        write(tmp_path / "file" / "folder")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way"


def test_config_json_of_an_export_comes_last(tmp_path, monkeypatch):
    """Whoever sees it sees a whole folder."""
    names = []
    monkeypatch.setattr(
        "leangpt.system.whole_files.os.replace", lambda temporary, path: names.append(path.name)
    )
    export_pretrained(tiny_gpt(), tmp_path)
    assert names == ["model.safetensors", "config.json"]


def test_other_errors_pass_and_leave_no_temporary_file(tmp_path):
    with pytest.raises(KeyError), written_whole(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError("a bug")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_training_is_one_line(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.csv")
    with full_disk(room=100), pytest.raises(UserError, match="cannot write .*metrics.csv"):
        metrics.write(iter=1, loss="1" * 100)


def test_two_processes_never_share_a_temporary_file(tmp_path):
    """Nor do two of one number, as there are on two machines that share the folder."""
    path = tmp_path / "a"
    with written_whole(path) as mine:
        mine.write_text("half of")
        with written_whole(path) as theirs:
            theirs.write_text("theirs")
        mine.write_text("mine")
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_goes_when_it_is_old(tmp_path):
    left, live, other = (tmp_path / name for name in ("a.7.tmp", "a.8.tmp", "ab.7.tmp"))
    for file in (left, live, other):
        file.write_text("half")
    for file in (left, other):
        os.utime(file, (0, 0))
    write_whole(tmp_path / "a", b"whole")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a", live, other]


def test_on_the_disk_before_its_name_and_its_name_too(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr("leangpt.system.whole_files.sync", lambda path: steps.append(path.name))
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda *names: (steps.append("renamed"), replace(*names)))
    write_whole(tmp_path / "a", b"whole")
    assert steps[0].startswith("a.") and steps[1:] == ["renamed", tmp_path.name]
