"""A GGUF file's 4-bit codes become 4-bit layers as they are, whatever order its rows have."""

import numpy as np
import pytest
import torch
from torch import nn

import sample
from leangpt.int4.quantize import int4_layers
from leangpt.int4.stored import read_blocks, take_stored_
from leangpt.text.model_text import ModelText
from leangpt.text.tokens import CharTokenizer
from leangpt.weights.export import export_pretrained
from leangpt.weights.load import load_pretrained
from model import GPT

gguf = pytest.importorskip("gguf")
KINDS = {name: getattr(gguf.GGMLQuantizationType, name) for name in ("Q4_0", "Q4_1", "Q8_0")}
C, F, H, G, V = 64, 96, 4, 2, 48
SHAPES = {
    "attn_q": (C, C),
    "attn_k": (C // H * G, C),
    "attn_v": (C // H * G, C),
    "attn_output": (C, C),
    "ffn_gate": (F, C),
    "ffn_up": (F, C),
    "ffn_down": (C, F),
}


def write_llama(path, kinds):
    """One layer of a Llama at `path`; kinds: {role: how it is stored}, Q4_1 where not said."""
    generator = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "context_length": 32,
        "embedding_length": C,
        "feed_forward_length": F,
        "block_count": 1,
        "attention.head_count": H,
        "attention.head_count_kv": G,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    shapes = {f"blk.0.{role}.weight": shape for role, shape in SHAPES.items()}
    for name, shape in {**shapes, "token_embd.weight": (V, C)}.items():
        numbers = torch.randn(shape, generator=generator).numpy()
        kind = KINDS[kinds.get(name.split(".")[-2], "Q4_1")]
        writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(C, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_codes_and_scales_of_blocks(kind):
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    data = gguf.quants.quantize(weight.numpy(), KINDS[kind])
    codes, scale_zero = read_blocks(data, kind)
    exact = torch.from_numpy(gguf.quants.dequantize(data, KINDS[kind]))
    scale, zero = scale_zero.float().repeat_interleave(32, dim=1).unbind(-1)
    error = ((codes.float() - 8) * scale + zero - exact).abs() / scale.abs()
    assert codes.dtype == torch.uint8 and codes.max() == 15
    assert error.max() < 0.05  # of a step between codes: bfloat16's rounding of scale and zero


def test_layers_are_the_files_own(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf", {"attn_v": "Q4_0"})
    exact, model = load_pretrained(GPT, path), load_pretrained(GPT, path)
    taken = take_stored_(model, path)
    block = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert set(taken) == {"lm_head", *(f"transformer.h.0.{name}" for name in block)}
    for name, layer in int4_layers(model).items():  # q and k in our order of rows
        weight = exact.get_submodule(name).weight
        assert (layer.dequantize() - weight).norm() < 0.004 * weight.norm(), name
    assert torch.equal(model.transformer.wte.weight, exact.transformer.wte.weight)
    idx = torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = exact(idx)[0], model(idx)[0]
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_what_is_not_wholly_in_4_bits_stays(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf", {"attn_v": "Q8_0", "token_embd": "Q8_0"})
    model = load_pretrained(GPT, path)
    taken = take_stored_(model, path)
    assert taken == list(int4_layers(model))
    assert taken == [
        f"transformer.h.0.{name}" for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    for name in ("transformer.h.0.attn.c_attn", "lm_head"):  # v and the embedding are in 8 bits
        assert isinstance(model.get_submodule(name), nn.Linear)


def test_other_files_have_none(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf", {})
    model = load_pretrained(GPT, path)
    export_pretrained(model, tmp_path / "hf")
    assert take_stored_(model, tmp_path / "hf") == []


def test_sampling_in_4_bits_keeps_them(tmp_path, monkeypatch, capsys):
    """Nothing is left to be rounded, so no text is written to round on."""
    path = write_llama(tmp_path / "tiny.gguf", {})
    text = ModelText(CharTokenizer("".join(map(chr, range(65, 65 + V)))))
    monkeypatch.setattr(sample, "text_of", lambda *_, **__: text)
    monkeypatch.setattr(sample, "quantize_gpt_", None)
    flags = [f"--init_from={path}", "--start=AB", "--max_new_tokens=4", "--device=cpu"]
    for said in ("5 layers keep the 4-bit codes", "rounded earlier"):
        sample.main([*flags, "--int4=True", "--num_samples=1"])
        assert said in capsys.readouterr().out
