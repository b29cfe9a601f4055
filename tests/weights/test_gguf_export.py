"""Models written as GGUF files and read back: weights, settings, tokenizer, chat format."""

import pytest
import torch
from chat_files import CHATS, TEMPLATE, model_text, text_files
from test_export import LLAMA3_ROPE, LLAMA_LIKE, SMALL, logits, random_model

from leangpt.system.errors import UserError
from leangpt.weights.chat_text import load_pretrained_text
from leangpt.weights.gguf_export import export_gguf, pairs_together
from leangpt.weights.load import halves_apart, load_pretrained
from model import GPT, GPTConfig

gguf = pytest.importorskip("gguf")
QWEN = dict(LLAMA_LIKE, n_kv_head=2, tie_embeddings=False, rope_theta=1e6)
MODELS = {
    "gpt2": dict(SMALL, bias=True, mlp="gelu_tanh"),
    "nanogpt": dict(SMALL, mlp="gelu_tanh"),
    "llama": dict(LLAMA_LIKE, n_kv_head=2),
    "llama3": dict(LLAMA_LIKE, rope_scaling=LLAMA3_ROPE, tie_embeddings=False),
    "llama-linear": dict(LLAMA_LIKE, rope_scaling=dict(rope_type="linear", factor=2.0)),
    "mistral": dict(LLAMA_LIKE, sliding_window=32),
    "wide heads": dict(LLAMA_LIKE, n_head_dim=16),
    "qwen2": dict(QWEN, qkv_bias=True),
    "qwen3": dict(QWEN, qk_norm=True, n_head_dim=16),
}


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_what_is_read_back_gives_the_same_logits(tmp_path, settings):
    model = random_model(**settings)
    for kind, most in (("F32", 1e-6), ("F16", 2e-3), ("Q8_0", 0.05)):
        export_gguf(model, tmp_path / f"{kind}.gguf", kind)
        again = load_pretrained(GPT, tmp_path / f"{kind}.gguf")
        found, expected = logits(again)[0], logits(model)[0]
        error = (found - expected).norm() / expected.norm()
        assert error < most and (kind == "F32" or error > most / 1000), kind
        for name in ("qkv_bias", "qk_norm", "sliding_window", "head_dim", "block_size"):
            assert getattr(again.config, name) == getattr(model.config, name)
    sizes = [(tmp_path / f"{kind}.gguf").stat().st_size for kind in ("F32", "F16", "Q8_0")]
    assert sizes[0] > 1.3 * sizes[1] > 1.3 * sizes[2]


def test_pairs():
    weight = torch.randn(24, 5)
    assert torch.equal(halves_apart(pairs_together(weight, 3), 3), weight)
    assert not torch.equal(pairs_together(weight, 3), weight)


@pytest.mark.slow
def test_the_text_goes_along(tmp_path):
    model = random_model(**dict(MODELS["llama"], vocab_size=260))
    notes = export_gguf(model, tmp_path / "m.gguf", "F16", text_files())
    assert notes == []
    found, text = load_pretrained_text(tmp_path / "m.gguf"), model_text()
    assert found.template == TEMPLATE and found.stop_tokens == (1,)
    for messages in CHATS:
        assert found.chat_ids(messages) == text.chat_ids(messages)


def test_a_tokenizer_without_a_name_is_left_out(tmp_path):
    files = text_files() | {"tokenizer.json": '{"model": {"type": "WordLevel", "vocab": {}}}'}
    notes = export_gguf(random_model(**MODELS["llama"]), tmp_path / "m.gguf", "F16", files)
    assert len(notes) == 1 and "without a tokenizer" in notes[0]


@pytest.mark.parametrize(
    "settings, kind, words",
    [
        (SMALL, "F16", "gelu_tanh"),
        (dict(SMALL, position="none"), "F16", "position"),
        (dict(LLAMA_LIKE, bias=True), "F16", "bias"),
        (LLAMA_LIKE, "Q4_0", "F32, F16, Q8_0, not 'Q4_0'"),
    ],
)
def test_what_cannot_be_said_is_named(tmp_path, settings, kind, words):
    with pytest.raises(UserError, match=words):
        export_gguf(GPT(GPTConfig(**settings)), tmp_path / "m.gguf", kind)
    assert list(tmp_path.iterdir()) == []


def test_packed_weights_are_named(tmp_path):
    from leangpt.int4.quantize import quantize_

    with pytest.raises(UserError, match="packed"):
        export_gguf(
            quantize_(random_model(**dict(LLAMA_LIKE, n_inner=64)), group_size=32),
            tmp_path / "m.gguf",
        )
