"""4-bit files: what was saved is loaded, and nothing else is."""

import json
import os
import time

import pytest
import torch
from int4_models import make_model
from safetensors.torch import load_file, save_file
from torch import nn

from leangpt.int4.calibration import quantize_gpt_
from leangpt.int4.files import load_int4, save_int4
from leangpt.int4.quantize import quantize_
from leangpt.layers.int4_linear import Int4Linear
from leangpt.memory.meter import measure_peak
from leangpt.system.errors import UserError
from model import GPT


@pytest.mark.slow
def test_files_round_trip(tmp_path):
    model = quantize_gpt_(make_model(position="rope", attention_policy="grouped", n_kv_head=2), 64)
    path = tmp_path / "model.safetensors"
    save_int4(model, path, {"dataset": {"name": "x"}})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    weights = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, Int4Linear)
    )
    floats = sum(p.numel() * p.element_size() for p in model.parameters())
    assert path.stat().st_size < weights * 4.5 / 8 + floats + 8000
    loaded, notes = load_int4(GPT, path, dtype=torch.float32)
    assert notes == {"dataset": {"name": "x"}} and not loaded.training
    assert loaded.config == model.config
    idx = torch.randint(65, (1, 20))
    with torch.no_grad():
        assert torch.equal(loaded(idx)[0], model(idx)[0])
    half, _ = load_int4(GPT, path)
    assert half.transformer.wte.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_loading_never_makes_a_float_model(tmp_path):
    model = quantize_(make_model(n_embd=256, n_layer=4, vocab_size=512), 32)
    path = tmp_path / "model.safetensors"
    save_int4(model, path)
    float_bytes = 2 * sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, Int4Linear)
    )  # as bfloat16
    assert measure_peak(lambda: load_int4(GPT, path)) < float_bytes


def test_damaged_files_are_one_clear_error(tmp_path):
    model = quantize_(make_model(), 32)
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="cannot read"):
        load_int4(GPT, path)
    with pytest.raises(UserError, match="not in 4 bits"):
        save_int4(make_model(), path)
    with pytest.raises(UserError, match="cannot write"):
        save_int4(model, "/dev/null/model.safetensors")
    save_int4(model, path)
    whole = path.read_bytes()
    for part in (whole[:100], whole[:-50], b"", b"x" * 500):
        path.write_bytes(part)
        with pytest.raises(UserError, match="cannot read"):
            load_int4(GPT, path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a 4-bit model"):
        load_int4(GPT, path)
    model.transformer.ln_f.weight = nn.Parameter(torch.ones(7))
    save_int4(model, path)
    with pytest.raises(UserError, match=r"ln_f.weight.*\(64,\).*\(7,\)"):
        load_int4(GPT, path)


@pytest.fixture
def saved(tmp_path):
    """(path, tensors, header): a 4-bit model's file and what it holds."""
    path = tmp_path / "model.safetensors"
    model = quantize_(make_model(bias=True), 32)
    save_int4(model, path)
    header = {
        "format": "int4-groups",
        "group_size": "32",
        "model_args": json.dumps(vars(model.config)),
        "notes": "{}",
    }
    load_int4(GPT, path)  # what only a first time takes is no refusal's
    return path, load_file(path), header


def refuse(path, words):
    """load_int4 says one line about the file, and soon."""
    began = time.process_time()
    with pytest.raises(UserError, match=words) as error:
        load_int4(GPT, path)
    assert time.process_time() - began < 2
    assert "\n" not in str(error.value)


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "name,dtype",
    [
        *(("transformer.h.0.attn.c_attn.scale_zero", d) for d in (torch.uint8, torch.bool, FLOAT8)),
        *(("transformer.h.0.attn.c_attn.scale_zero", d) for d in (torch.float16, torch.float32)),
        *(("lm_head.packed", d) for d in (torch.bool, torch.int8, torch.int64, torch.bfloat16)),
        *(("transformer.h.1.mlp.c_fc.bias", d) for d in (torch.int32, torch.bool, FLOAT8)),
        *(("transformer.ln_f.weight", d) for d in (torch.int64, FLOAT8)),
    ],
)
def test_every_tensor_has_the_dtype_that_kernels_read(saved, name, dtype):
    """Scales of one byte each, say, would have them read past the tensor's end."""
    path, tensors, header = saved
    save_file(tensors | {name: tensors[name].to(dtype)}, path, header)
    refuse(path, f"{name} is {dtype}, not ")


def test_other_floats_are_converted(saved):
    path, tensors, header = saved
    name = "transformer.ln_f.weight"
    save_file(tensors | {name: tensors[name].half()}, path, header)
    model, _ = load_int4(GPT, path)
    assert model.transformer.ln_f.weight.dtype == torch.bfloat16
    assert model.transformer.h[0].mlp.c_fc.bias.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(n_layer=10**7), "10000000 layers are announced, and the file has"),
        (dict(n_layer=0), "n_layer must be positive"),
        (dict(n_embd=2**28), "lm_head.packed should have shape"),
        (dict(n_embd=2**62), "no tensor can be of the announced sizes"),
        (dict(n_embd=10**30), "no tensor can be of the announced sizes"),
        (dict(n_embd=48), "does not divide the 48 inputs"),
        (dict(n_layer="2"), "n_layer must be int, not '2'"),
        (dict(n_layer=True), "n_layer must be int, not True"),
        (dict(n_kv_head=[2]), "n_kv_head must be int or None"),
        (dict(norm_eps=None), "norm_eps must be float, not None"),
        (dict(bias="yes"), "bias must be bool"),
        (dict(experts=3), "keys this model lacks"),
    ],
)
def test_announced_sizes_are_held_against_the_file(saved, changes, words):
    path, tensors, header = saved
    arguments = json.loads(header["model_args"]) | changes
    save_file(tensors, path, header | {"model_args": json.dumps(arguments)})
    refuse(path, words)


@pytest.mark.parametrize(
    "changes",
    [
        *(dict(group_size=size) for size in ("0", "-32", "48", "x", "9" * 5000, "1e300")),
        *(dict(model_args=text) for text in ("[]", "3", "null", "{", "[" * 10**5)),
        *(dict(notes=text) for text in ("[]", "3", "{", '{"dataset": ""}', '{"init_from": 3}')),
        dict(notes='{"dataset": {"folder": 5}}'),
        dict(format="other"),
    ],
)
def test_damaged_headers(saved, changes):
    path, tensors, header = saved
    save_file(tensors, path, header | changes)
    refuse(path, "damaged|group_size|not a 4-bit model")


def test_a_flipped_bit_is_noticed_and_older_files_have_no_checksum(saved):
    path, tensors, header = saved
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    start = 8 + int.from_bytes(whole[:8], "little")  # where the tensors begin
    for at in torch.randint(start, len(whole), (20,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        refuse(path, "is damaged: its checksum differs")
    save_file(tensors, path, header)
    load_int4(GPT, path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    refuse(tmp_path / "model.safetensors", "is a pipe, socket or device, not a file")
    refuse(tmp_path, "is a folder, not a file")
