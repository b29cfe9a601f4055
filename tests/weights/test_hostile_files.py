"""Small files that ask for everything: one line each, within two seconds, no memory to speak of."""

import os
import random
import signal
import struct
import time
import zipfile
from functools import partial

import pytest
import torch
from pretrained_files import gpt2_config, gpt2_tensors, write_folder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from leangpt.int4.files import load_int4
from leangpt.runs.checkpoint import load_checkpoint, model_args, model_from_checkpoint
from leangpt.system.errors import UserError
from leangpt.text.chat_template import render_alone
from leangpt.text.model_text import ModelText
from leangpt.weights.chat_text import load_pretrained_text
from leangpt.weights.gguf_header import check_header
from leangpt.weights.load import load_pretrained
from model import GPT, GPTConfig


class Late(BaseException):
    """Not an Exception: that is what files may make any parser raise."""


@pytest.fixture
def soon():
    """Two seconds of the processor, or a minute of waiting inside a system call, and the test
    fails; by the clock a busy machine would be late with anything."""

    def late(number, frame):
        raise Late("not done in time")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, 2), signal.SIGALRM: (signal.ITIMER_REAL, 60)}
    usual = {number: signal.signal(number, late) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    yield
    for timer, _ in timers.values():
        signal.setitimer(timer, 0)
    for number, handler in usual.items():
        signal.signal(number, handler)


def refused(call, words=""):
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


# ---- what a file announces ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_layer=10**7), "10000000 layers are announced"),
        (dict(n_embd=2**40, n_head=2), "shape|announced sizes"),
        (dict(n_embd=10**30, n_head=2), "announced sizes"),
        (dict(vocab_size=10**12), "shape"),
        (dict(n_positions=10**12), "shape"),
    ],
)
def test_sizes_in_a_config_json(tmp_path, changes, words, soon):
    write_folder(tmp_path, gpt2_config() | changes, gpt2_tensors())
    refused(lambda: load_pretrained(GPT, tmp_path), words)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_layer=10**7), "10000000 layers are announced"),
        (dict(n_embd=2**28), "should have shape"),
        (dict(n_embd=10**30), "more than 64 bits"),
        (dict(vocab_size=10**12), "should have shape"),
        (dict(block_size=10**12), "wpe.weight should have shape"),
        (dict(n_layer="2"), "n_layer must be int"),
    ],
)
def test_sizes_in_a_checkpoint(tmp_path, changes, words, soon):
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))
    arguments = model_args(model) | changes
    checkpoint = {"model": model.state_dict(), "model_args": arguments, "iter_num": 3}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    path = tmp_path / "ckpt.pt"
    refused(lambda: model_from_checkpoint(GPT, load_checkpoint(path)), words)


def laughs():
    """A list of 2**60 entries in a few hundred bytes: each list holds the one before twice."""
    value = ["ha"]
    for _ in range(60):
        value = [value, value]
    return value


def deep():
    value = []
    for _ in range(100):
        value = [value]
    return value


def endless():
    value = []
    value.append(value)
    return value


BOMBS = {
    "laughs": laughs,
    "deep": deep,
    "endless": endless,
    "long number": lambda: 10**5000,
    "one number, repeated": lambda: torch.zeros(1).expand(10**9, 10**5),
    "no numbers": lambda: torch.empty(10**9, 10**5, device="meta"),
    "nothing but zeros": lambda: torch.sparse_coo_tensor(
        [[]], [], (10**15,), check_invariants=True
    ),
}
PLACES = (
    ("best_val_loss",), ("train_seconds",), ("iter_num",), ("config",), ("config", "dataset"),
    ("dataset",), ("dataset", "characters"), ("dataset", "source"), ("model_args",),
    ("model_args", "n_layer"), ("optimizer",), ("optimizer", "state", 0, "exp_avg"),
    ("optimizer", "param_groups", 0, "lr"), ("scaler",), ("text_files",), ("model",),
    ("model", "lm_head.weight"), ("unheard of",),
)  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_checkpoint_that_unfolds_to_more_than_it_is(tmp_path, bomb, soon):
    path, value = tmp_path / "ckpt.pt", BOMBS[bomb]()
    for *place, last in PLACES:
        checkpoint = {
            "model": {"lm_head.weight": torch.zeros(2, 2)},
            "model_args": {"n_layer": 1},
            "iter_num": 1,
            "config": {"dataset": "tiny"},
            "dataset": {"characters": "ab"},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1.0}]},
        }
        holder = checkpoint
        for name in place:
            holder = holder[name]
        holder[last] = value
        torch.save(checkpoint, path)
        for mmap in (False, True):
            refused(partial(load_checkpoint, path, mmap=mmap), "truncated or not a checkpoint")


def test_a_checkpoint_of_compressed_entries(tmp_path, soon):
    """A gigabyte of zeros in a megabyte; torch.save compresses nothing."""
    whole, path = tmp_path / "whole.pt", tmp_path / "ckpt.pt"
    torch.save({"model": {}, "model_args": {}, "iter_num": 1}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in source.namelist():
            file.writestr(name, source.read(name))
        file.writestr("archive/data/9", bytes(10**7), compresslevel=1)
    refused(partial(load_checkpoint, path), "its entries are larger than itself")


def test_what_a_checkpoint_may_hold(tmp_path):
    """Tied weights, which are one tensor's numbers twice, and as many small things as there are."""
    weight = torch.randn(500, 40)
    checkpoint = {
        "model": {"lm_head.weight": weight, "transformer.wte.weight": weight},
        "model_args": {},
        "iter_num": 1,
        "config": {"seed": 2**63 - 1},
        "optimizer": {"state": {}, "param_groups": [{"params": list(range(10_000))}]},
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert load_checkpoint(tmp_path / "ckpt.pt")["optimizer"] == checkpoint["optimizer"]


# ---- GGUF ---------------------------------------------------------------------------------------


def text(name):
    return struct.pack("<Q", len(name)) + name.encode()


def header(tensors=0, pairs=1, rest=b"", version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, pairs) + rest


def array(kind, count):
    return text("general.list") + struct.pack("<IIQ", 9, kind, count)


GGUF_BOMBS = {
    "2**60 numbers": header(rest=array(4, 2**60) + bytes(24)),
    "2**60 texts": header(rest=array(8, 2**60) + bytes(24)),
    "2**60 lists": header(rest=array(9, 2**60) + bytes(24)),
    "lists in lists": header(rest=array(9, 1) + struct.pack("<IQ", 9, 1) * 1000),
    "2**60 settings": header(pairs=2**60),
    "2**60 tensors": header(2**60, 0, bytes(24)),
    "a long name": header(rest=struct.pack("<Q", 2**60) + bytes(24)),
    "a value of no type": header(rest=text("a") + struct.pack("<IQ", 99, 0)),
    "2**31 dimensions": header(1, 0, text("a") + struct.pack("<I", 2**31) + bytes(64)),
    "huge dimensions": header(
        1, 0, text("a") + struct.pack("<I4QIQ", 4, *(2**62,) * 4, 0, 0) + bytes(64)
    ),
    "no alignment": header(
        1,
        1,
        text("general.alignment")
        + struct.pack("<II", 4, 0)
        + text("a")
        + struct.pack("<IQIQ", 1, 4, 0, 0)
        + bytes(64),
    ),
    "another version": header(version=77),
    "something else": header(magic=b"GGML"),
    "nothing": b"",
    "four letters": b"GGUF",
}


@pytest.mark.parametrize("name", GGUF_BOMBS)
def test_what_a_gguf_file_announces(tmp_path, name, soon):
    (tmp_path / "model.gguf").write_bytes(GGUF_BOMBS[name])
    refused(lambda: load_pretrained(GPT, tmp_path / "model.gguf"), "model.gguf")


@pytest.mark.slow
def test_a_whole_gguf_file_passes_and_its_parts_do_not(tmp_path):
    pytest.importorskip("gguf")
    from test_gguf import gguf_llama, toy_vocabulary

    path = gguf_llama(tmp_path / "tiny.gguf", changes=toy_vocabulary())
    check_header(path)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(50):
        path.write_bytes(whole[: rng.randrange(len(whole) // 2)])
        refused(lambda: load_pretrained(GPT, path), "tiny.gguf")
    for _ in range(100):  # a flipped bit may leave a model, or be refused
        damaged = bytearray(whole)
        damaged[rng.randrange(3000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            load_pretrained(GPT, path)
        except UserError as error:
            assert "\n" not in str(error)


# ---- chat templates -----------------------------------------------------------------------------


TEMPLATES = {
    "loops in loops": "{% for a in range(99999) %}" * 6 + "{% endfor %}" * 6,
    "a power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "a long text": "{{ 'a' * 10**11 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "wide formats": "{{ '%0999999999999d' % 1 }}",
    "a long answer": "{% for a in range(99999) %}{{ 'b' * 1000 }}{% endfor %}",
    "itself": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "division by zero": "{{ 1 / 0 }}",
    "no such method": "{{ messages.frobnicate() }}",
    "an error of its own": "{{ raise_exception('roles\nmust alternate') }}",
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_under_limits(name):
    began = time.process_time() + sum(os.times()[2:4])
    toy = ModelText(tokenizer=None, template=TEMPLATES[name])
    refused(lambda: toy.chat("Hi"), "the model's chat format cannot be filled in")
    spent = time.process_time() + sum(os.times()[2:4]) - began
    assert spent < 2, f"{spent:.1f} s of the processor"


def test_what_a_template_gets_comes_back_as_it_was():
    odd = 'line\nends, "quotes", {{ braces }}, \u00e9, \u4f60, \U0001f600, \ud800'
    assert render_alone("{{ a }}|{{ b[0] }}", {"a": odd, "b": [3]}) == odd + "|3"


# ---- pipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ],
)
def test_a_pipe_in_a_models_folder_is_not_waited_for(tmp_path, name, soon):
    write_folder(tmp_path, gpt2_config(), gpt2_tensors())
    (tmp_path / "tokenizer.json").write_text(Tokenizer(WordLevel({"a": 0}, "a")).to_str())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    weights = name in ("config.json", "model.safetensors")
    load = partial(load_pretrained, GPT) if weights else load_pretrained_text
    refused(lambda: load(tmp_path), f"{name} is a pipe, socket or device")


def test_other_pipes_are_not_waited_for_either(tmp_path, soon):
    os.mkfifo(tmp_path / "model.gguf")
    refused(lambda: load_pretrained(GPT, tmp_path / "model.gguf"), "no such folder or .gguf file")
    refused(lambda: check_header(tmp_path / "model.gguf"), "is a pipe")
    os.mkfifo(tmp_path / "ckpt.pt")
    refused(lambda: load_checkpoint(tmp_path / "ckpt.pt"), "is a pipe")
    refused(lambda: load_checkpoint("/dev/zero"), "is a pipe, socket or device")


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors", "model.txt", "model"])
def test_a_gguf_file_by_another_name_is_called_one(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF\x03")
    for load in (load_pretrained, load_int4):
        refused(partial(load, GPT, tmp_path / name), "a GGUF file: give it a name that ends")


def test_a_checkpoint_of_ours_is_given_by_its_folder(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        refused(partial(load_pretrained, GPT, path), f"--out_dir={tmp_path}")
