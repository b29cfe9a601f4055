"""4-bit weights beside the checkpoint: rounded once, read from then on, never another model's."""

import multiprocessing
import os

import pytest
import torch
from int4_models import make_model

from leangpt.int4 import kept
from leangpt.int4.calibration import quantize_gpt_
from leangpt.int4.kept import read_or_round
from model import GPT

SHAPE = dict(n_layer=1, n_embd=32, vocab_size=40)


class Once:
    """round_ for read_or_round, which counts how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model):
        self.calls += 1
        quantize_gpt_(model)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("LEANGPT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "out" / "ckpt.pt"
    path.parent.mkdir()
    path.write_bytes(b"")
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@torch.no_grad()
def test_rounded_once_and_read_from_then_on(source):
    rounder, said, outputs = Once(), [], []
    idx = torch.arange(8)[None]
    for _ in range(3):
        model = read_or_round(make_model(**SHAPE), source, rounder, say=said.append)
        outputs.append(model(idx)[0])
    assert rounder.calls == 1
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    path = source.parent / "int4" / "ckpt-g32.safetensors"
    assert names(path.parent) == [path.name]  # neither lock nor temporary file
    assert said[0].startswith("rounded to 5 bits") and f"kept in {path}" in said[0]
    assert said[1].startswith(f"5 bits per weight, rounded earlier: read {path} in")
    assert len(said) == 3


@pytest.mark.parametrize("change", ["weight", "shape", "group", "tune", "rounding"])
def test_another_model_or_way_is_rounded_anew(source, change, monkeypatch):
    rounder, said = Once(), []
    read_or_round(make_model(**SHAPE), source, rounder, say=said.append)
    model, options = make_model(**SHAPE), {}
    if change == "weight":
        with torch.no_grad():
            model.transformer.h[0].ln_1.weight[3] += 1e-6
    elif change == "shape":  # the same weights mean something else
        model = GPT(type(model.config)(**{**vars(model.config), "n_head": 2}))
        model.load_state_dict(make_model(**SHAPE).state_dict())
    elif change == "rounding":
        monkeypatch.setattr(kept, "ROUNDING", kept.ROUNDING + 1)
    else:
        options = {"group": {"group_size": 64}, "tune": {"tune": 5}}[change]
        options = {} if change == "group" else options
        model = make_model(**(SHAPE | {"n_embd": 64})) if change == "group" else model
    read_or_round(model, source, rounder, say=said.append, **options)
    assert rounder.calls == 2
    if change != "tune":  # which has a file of its own
        assert "was rounded from other weights: rounded to" in said[1]


def test_attention_settings_are_the_runs_own(source):
    rounder = Once()
    read_or_round(make_model(**SHAPE), source, rounder, say=lambda line: None)
    model = make_model(**SHAPE)
    model.config.attention_policy = "recompute"
    model = read_or_round(model, source, rounder, say=lambda line: None)
    assert rounder.calls == 1 and model.config.attention_policy == "recompute"


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_damaged_file_is_made_anew(source, part):
    rounder, said = Once(), []
    read_or_round(make_model(**SHAPE), source, rounder, say=said.append)
    path = source.parent / "int4" / "ckpt-g32.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    read_or_round(make_model(**SHAPE), source, rounder, say=said.append)
    assert rounder.calls == 2 and said[1].startswith(f"{path} was damaged: rounded to 5 bits")
    read_or_round(make_model(**SHAPE), source, rounder, say=said.append)
    assert rounder.calls == 2


@pytest.mark.skipif(os.name != "posix", reason="needs a folder that nobody can write to")
def test_what_cannot_lie_beside_lies_in_the_cache(source, tmp_path):
    (source.parent / "int4").write_text("a file, where the folder would be")
    rounder, said = Once(), []
    for _ in range(2):
        read_or_round(make_model(**SHAPE), source, rounder, say=said.append)
    assert rounder.calls == 1 and str(tmp_path / "cache" / "int4") in said[0]
    (tmp_path / "cache" / "int4").rename(tmp_path / "away")
    (tmp_path / "cache" / "int4").write_text("and here")
    for _ in range(2):
        read_or_round(make_model(**SHAPE), source, rounder, say=said.append)
    assert rounder.calls == 3 and said[3].endswith("kept nowhere, no folder for it can be written")


def test_hub_names_go_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LEANGPT_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    said = []
    read_or_round(make_model(**SHAPE), "someone/some-model", Once(), say=said.append)
    assert (tmp_path / "int4/someone-some-model/model-g32.safetensors").is_file()


def in_a_process(source, cache, said):
    os.environ["LEANGPT_CACHE"] = str(cache)
    torch.set_num_threads(1)
    read_or_round(make_model(**SHAPE), source, Once(), say=said.put)


@pytest.mark.slow
def test_two_at_once_round_once(source, tmp_path):
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    arguments = (source, tmp_path / "cache", said)
    processes = [context.Process(target=in_a_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = [said.get() for _ in range(2)]
    lines += [] if said.empty() else [said.get()]  # "... in use by process ...: waiting"
    assert sum("rounded to" in line for line in lines) == 1
    assert sum("rounded earlier" in line for line in lines) == 1
