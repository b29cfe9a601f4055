"""Exported folders: transformers reads them and gives our logits; what it cannot say is named."""

import json
import os
from pathlib import Path

import pytest
import torch

from leangpt.system.errors import UserError
from leangpt.weights import export
from leangpt.weights.export import export_pretrained
from leangpt.weights.load import load_pretrained
from model import GPT, GPTConfig

SMALL = dict(block_size=32, vocab_size=59, n_layer=2, n_head=4, n_embd=32)
LLAMA_LIKE = dict(SMALL, position="rope", norm="rmsnorm", mlp="swiglu", n_inner=40)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
MODELS = {
    "nanogpt": SMALL,
    "gpt2": dict(SMALL, bias=True, mlp="gelu_tanh", norm_eps=1e-4),
    "gpt2-untied-narrow": dict(SMALL, bias=True, tie_embeddings=False, n_inner=48),
    "llama": LLAMA_LIKE,
    "llama-gqa-untied": dict(
        LLAMA_LIKE, n_kv_head=2, tie_embeddings=False, rope_theta=5e5, norm_eps=1e-6
    ),
    "llama-grouped-llama3": dict(LLAMA_LIKE, attention_policy="grouped", rope_scaling=LLAMA3_ROPE),
    "llama-linear": dict(LLAMA_LIKE, rope_scaling=dict(rope_type="linear", factor=2.0)),
}


def random_model(seed=0, **settings):
    """A GPT whose every parameter, norms and biases included, is far from its initial value."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "ln" in name and "weight" in name else 0.0
            parameter.copy_(scale + 0.25 * torch.randn_like(parameter))
    return model


def logits(model, length=30):
    idx = torch.randint(59, (2, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(idx)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_transformers_gives_the_same_logits(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    model = random_model(**settings)
    export_pretrained(model, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report  # nothing missing, left over or misshapen
    expected = logits(model)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(theirs.eval()).logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_our_own_loader_gives_the_same_logits(tmp_path, settings):
    model = random_model(**settings)
    again = load_pretrained(GPT, export_pretrained(model, tmp_path))
    torch.testing.assert_close(logits(again)[0], logits(model)[0], atol=1e-6, rtol=1e-6)
    assert again.config.kv_heads == model.config.kv_heads
    assert [p.name for p in tmp_path.glob("*.tmp")] == []


def test_shards(tmp_path, monkeypatch):
    model = random_model(**MODELS["llama-gqa-untied"])
    monkeypatch.setattr(export, "SHARD_BYTES", 10_000)
    export_pretrained(model, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 12_000 for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    torch.testing.assert_close(logits(load_pretrained(GPT, tmp_path))[0], logits(model)[0])


def test_bfloat16_stays_bfloat16(tmp_path):
    model = random_model(**SMALL).bfloat16()
    export_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = dict(load_pretrained(GPT, tmp_path).named_parameters())  # float32, and with zero biases
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.float(), again[name]), name


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(SMALL, n_kv_head=2), "kv_heads"),
        (dict(SMALL, position="none"), "position"),
        (dict(SMALL, mlp="swiglu"), "mlp"),
        (dict(SMALL, norm="rmsnorm"), "norm"),
        (dict(SMALL, position="rope"), "norm"),
        (dict(LLAMA_LIKE, bias=True), "bias"),
        (dict(LLAMA_LIKE, rope_scaling=dict(rope_type="factors", factors=[1.0] * 4)), "factors"),
    ],
)
def test_what_transformers_lacks_is_named_and_nothing_written(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        export_pretrained(GPT(GPTConfig(**settings)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        export_pretrained(random_model(**SMALL), tmp_path / "file")


@pytest.mark.parametrize("name", ["ckpt.pt", "metrics.csv", "meta.json", "train.bin"])
def test_a_folder_of_something_else_stays_as_it_is(tmp_path, name):
    """A run's config.json is called like a model's."""
    (tmp_path / name).write_text("")
    (tmp_path / "config.json").write_text("a run's")
    with pytest.raises(UserError, match=f"is not a model's .{name}.; give another folder"):
        export_pretrained(random_model(**SMALL), tmp_path)
    assert (tmp_path / "config.json").read_text() == "a run's"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "config.json"])


class Killed(BaseException):
    """Ends an export where it stands, as SIGKILL would: nothing is tidied up."""


def test_wherever_an_export_is_killed_no_mixed_model_is_read(tmp_path, monkeypatch):
    """Over an earlier export, before each of its renames and removals in turn: what is read then is
    old and whole, new and whole, or refused."""
    monkeypatch.setattr("leangpt.weights.export.SHARD_BYTES", 20_000)
    models = [random_model(**SMALL, seed=seed) for seed in (1, 2)]
    texts = [{"tokenizer_config.json": json.dumps({"which": which})} for which in ("old", "new")]
    real = {"replace": os.replace, "unlink": Path.unlink}
    outcomes = []
    for killed_at in range(60):
        folder, calls = tmp_path / str(killed_at), [0]
        export_pretrained(models[0], folder, texts[0])

        def counted(name, calls=calls, killed_at=killed_at):
            def call(path, *arguments, **options):
                calls[0] += 1
                if calls[0] > killed_at:
                    raise Killed
                return real[name](path, *arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted("replace"))
            patch.setattr(Path, "unlink", counted("unlink"))
            try:
                export_pretrained(models[1], folder, texts[1])
            except Killed:
                pass
        try:
            weights = load_pretrained(GPT, folder).state_dict()
            which = json.loads((folder / "tokenizer_config.json").read_text())["which"]
            expected = models[which == "new"].state_dict()
            assert all(torch.equal(weights[name], expected[name]) for name in expected), killed_at
            outcomes.append(which)
        except UserError:
            outcomes.append("refused")
        if calls[0] <= killed_at:
            break
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)
    assert {"old", "new"} < set(outcomes) and outcomes.count("refused") > 3


def test_packed_weights_are_named(tmp_path):
    from leangpt.int4.quantize import quantize_

    model = quantize_(random_model(**SMALL), group_size=32)
    with pytest.raises(UserError, match="packed"):
        export_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
