"""Published weights in our model: logits equal to transformers', damaged files named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretrained_files import gpt2_config, gpt2_tensors, write_folder

from leangpt.memory.meter import measure_peak, tensor_bytes
from leangpt.system.errors import UserError
from leangpt.weights.find import find_pretrained, open_weights
from leangpt.weights.hf_files import SafetensorsWeights
from leangpt.weights.load import load_pretrained
from model import GPT

LLAMA = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    rms_norm_eps=1e-6,
    attn_implementation="eager",
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def theirs_and_ours(model, folder, length=40, **options):
    """Logits of a transformers model and of ours loaded from where it saved itself."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():  # norms and biases too must be carried over
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln" in name), std=0.2)
    model = model.eval()
    model.save_pretrained(folder, **options)
    idx = torch.randint(model.config.vocab_size, (2, length))
    with torch.no_grad():
        return model(idx).logits, load_pretrained(GPT, folder)(idx)[0]


def assert_equal_logits(pair):
    theirs, ours = pair
    assert theirs.std() > 0.1  # logits that say something
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=1, tie_word_embeddings=True),
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
        dict(rope_parameters=LLAMA3_ROPE),
    ],
    ids=["gqa", "mha", "mqa-tied", "linear-rope", "llama3-rope"],
)
def test_llama_logits_equal_transformers(transformers, tmp_path, changes):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes}))
    assert_equal_logits(theirs_and_ours(model, tmp_path))


def test_keys_that_transformers_fills_in(transformers, tmp_path):
    """null for a no, and llama3 rope without its optional key: the length the model reads."""
    torch.manual_seed(0)
    rope = {key: LLAMA3_ROPE[key] for key in LLAMA3_ROPE if not key.startswith("original")}
    config = transformers.LlamaConfig(**{**LLAMA, "rope_parameters": rope})
    model = transformers.LlamaForCausalLM(config)
    assert_equal_logits(theirs_and_ours(model, tmp_path))
    hf = json.loads((tmp_path / "config.json").read_text())
    del hf["rope_parameters"]["original_max_position_embeddings"]
    hf |= dict(attention_bias=None, mlp_bias=None, tie_word_embeddings=None)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    idx = torch.randint(67, (2, 40))
    with torch.no_grad():
        assert_equal_logits((model(idx).logits, load_pretrained(GPT, tmp_path)(idx)[0]))


def test_scaling_changes_the_logits(transformers, tmp_path):
    # the rope tests above would pass on any scaling if it had no effect at these lengths
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "rope_parameters": LLAMA3_ROPE})
    _, ours = theirs_and_ours(transformers.LlamaForCausalLM(config), tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    hf["rope_parameters"] = dict(rope_type="default", rope_theta=500000.0)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    torch.manual_seed(1)
    idx = torch.randint(67, (2, 40))
    with torch.no_grad():
        assert (load_pretrained(GPT, tmp_path)(idx)[0] - ours).abs().max() > 1e-3


def test_older_rope_keys(transformers, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "rope_parameters": LLAMA3_ROPE})
    theirs, ours = theirs_and_ours(transformers.LlamaForCausalLM(config), tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    scaling = hf.pop("rope_parameters")
    hf |= dict(rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    torch.manual_seed(1)
    idx = torch.randint(67, (2, 40))
    model = load_pretrained(GPT, tmp_path)
    assert model.config.rope_theta == 500000.0
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], load_pretrained(GPT, tmp_path)(idx)[0])


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(activation_function="gelu", n_inner=40, tie_word_embeddings=False)],
    ids=["gpt2", "exact-gelu-untied"],
)
def test_gpt2_logits_equal_transformers(transformers, tmp_path, changes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=48,
        n_embd=24,
        n_layer=2,
        n_head=3,
        initializer_range=0.3,
        **changes,
    )
    assert_equal_logits(theirs_and_ours(transformers.GPT2LMHeadModel(config), tmp_path))


def test_shards(transformers, tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    assert_equal_logits(theirs_and_ours(model, tmp_path, max_shard_size="20KB"))
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} is missing"):
        load_pretrained(GPT, tmp_path)


def reference_gpt2(tensors, idx, n_head):
    """GPT-2's logits in float64 straight from a hub state dict: no code of this repository."""
    W = {name: tensor.double() for name, tensor in tensors.items()}
    norm = torch.nn.functional.layer_norm
    T, C = idx.shape[1], W["wte.weight"].shape[1]
    x = W["wte.weight"][idx] + W["wpe.weight"][:T]
    for i in range(2):

        def w(name, i=i):
            return W[f"h.{i}.{name}"]

        h = norm(x, (C,), w("ln_1.weight"), w("ln_1.bias"))
        qkv = h @ w("attn.c_attn.weight") + w("attn.c_attn.bias")
        q, k, v = (
            part.view(-1, T, n_head, C // n_head).transpose(1, 2) for part in qkv.split(C, dim=-1)
        )
        scores = q @ k.transpose(-2, -1) / (C // n_head) ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w("attn.c_proj.weight") + w("attn.c_proj.bias")
        h = norm(x, (C,), w("ln_2.weight"), w("ln_2.bias"))
        h = h @ w("mlp.c_fc.weight") + w("mlp.c_fc.bias")
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + h @ w("mlp.c_proj.weight") + w("mlp.c_proj.bias")
    return norm(x, (C,), W["ln_f.weight"], W["ln_f.bias"]) @ W["wte.weight"].t()


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_generated_gpt2_folder(tmp_path, prefix):
    tensors = gpt2_tensors()
    write_folder(tmp_path, gpt2_config(), gpt2_tensors(prefix=prefix))
    idx = torch.randint(61, (2, 16))
    model = GPT.from_pretrained(str(tmp_path))
    assert not model.training and model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        logits = model(idx)[0]
    expected = reference_gpt2(tensors, idx, n_head=3).float()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_dtype_and_overrides(tmp_path):
    write_folder(tmp_path, gpt2_config(), gpt2_tensors())
    model = load_pretrained(
        GPT, tmp_path, dtype=torch.bfloat16, block_size=8, dropout=0.1, attention_policy="recompute"
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.block_size == 8 and model.transformer.wpe.weight.shape == (8, 24)
    assert model.config.dropout == 0.1 and model.config.attention_policy == "recompute"


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(block_size=17), "1 to 16"),
        (dict(block_size=-1), "1 to 16"),
        (dict(n_layer=3), "n_layer is fixed"),
        (dict(atention_policy="cache"), "atention_policy"),
        (dict(attention_policy="grouped"), "grouped"),
    ],
)
def test_bad_overrides(tmp_path, overrides, words):
    write_folder(tmp_path, gpt2_config(), gpt2_tensors())
    with pytest.raises(UserError, match=words):
        load_pretrained(GPT, tmp_path, **overrides)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    "damage, words",
    [
        (drop("h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias is missing"),
        (drop("wte.weight"), "wte.weight is missing"),
        (put("h.2.ln_1.weight", torch.ones(24)), "h.2.ln_1.weight is not part"),
        (
            put("h.0.attn.c_attn.weight", torch.ones(72, 24)),
            r"c_attn.weight.*\[72, 24\].*\[24, 72\]",
        ),
        (put("ln_f.bias", torch.ones(24).int()), "ln_f.bias is torch.int32"),
        (put("lm_head.weight", torch.ones(61, 24)), "ties lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, damage, words):
    tensors = gpt2_tensors()
    damage(tensors)
    write_folder(tmp_path, gpt2_config(), tensors)
    with pytest.raises(UserError, match=words):
        load_pretrained(GPT, tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="bert"), "'bert' is not supported"),
        (dict(model_type=None), "None is not supported"),
        (dict(activation_function="relu"), "relu"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (dict(n_head=5), "n_head=5"),
        (dict(n_layer=0), "n_layer"),
        (dict(n_embd="24"), "n_embd"),
        (dict(activation_function=["gelu"]), r"\['gelu'\]"),
        (dict(layer_norm_epsilon="small"), "layer_norm_epsilon must be a positive number"),
        (dict(vocab_size=10**12), r"wte.weight has shape \[61, 24\], .* \[1000000000000, 24\]"),
        (dict(n_layer=10**12), "1000000000000 layers are announced"),
        (dict(quantization_config={"bits": 4}), "quantised"),
    ],
)
def test_unsupported_gpt2_configs(tmp_path, changes, words):
    write_folder(tmp_path, {**gpt2_config(), **changes}, gpt2_tensors())
    with pytest.raises(UserError, match=words):
        load_pretrained(GPT, tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "yarn"),
        (dict(hidden_size=30), "num_attention_heads=4 does not divide n_embd=30"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(hidden_act="relu"), "hidden_act"),
        (dict(layer_types=["chunked_attention"] * 2), "layer_types"),
        (dict(layer_types=3), "layer_types"),
        (dict(dual_chunk_attention_config={}), "dual_chunk_attention_config"),
        (dict(model_type="qwen3", attention_bias=True), "attention_bias"),
        (dict(model_type="qwen2", rope_scaling=dict(type="yarn", factor=4.0)), "yarn"),
        (dict(model_type="qwen2_moe"), "'qwen2_moe' is not supported.*mistral, qwen2, qwen3"),
        (dict(model_type=["llama"]), "is not supported"),
        (dict(num_key_value_heads=3), "n_kv_head=3"),
        (dict(head_dim="x"), "head_dim must be a positive whole number, not 'x'"),
        (dict(sliding_window=[4]), "sliding_window"),
        (dict(rope_scaling=3), "the rope settings must be an object, not 3"),
        (dict(rope_theta="1e4"), "rope_theta must be a positive number, not '1e4'"),
        (dict(rope_parameters=dict(rope_theta=0.0)), "rope_theta must be a positive number"),
        (dict(hidden_size=4 * 10**11, num_hidden_layers=1), "no tensor can be"),
    ],
)
def test_unsupported_llama_configs(tmp_path, changes, words):
    write_folder(tmp_path, {**LLAMA, "model_type": "llama", **changes}, {"x": torch.ones(1)})
    with pytest.raises(UserError, match=words):
        load_pretrained(GPT, tmp_path)


def test_damaged_and_partial_files(tmp_path):
    write_folder(tmp_path, gpt2_config(), gpt2_tensors())
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:5], b"", b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="model.safetensors"):
            load_pretrained(GPT, tmp_path)
    file.write_bytes(whole)
    for text in ("{", "[]", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json"):
            load_pretrained(GPT, tmp_path)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(gpt2_config()))
    torch.save({}, tmp_path / "pytorch_model.bin")
    for name in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(UserError, match="could run code"):
            load_pretrained(GPT, name)


@pytest.mark.parametrize(
    "name, words",
    [
        ("no/such/folder/here", "no such folder"),
        ("weights.gguf", "no such folder"),
        ("not a name", "not the name"),
        ("", "holds no config.json"),
    ],
)
def test_names_that_are_nothing(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        open_weights(find_pretrained(name))


@pytest.mark.slow
def test_hub_unreachable_is_one_line(tmp_path):
    pytest.importorskip("huggingface_hub")
    code = (
        "from model import GPT; from leangpt.system.errors import exit_cleanly; "
        "exit_cleanly(lambda: GPT.from_pretrained('gpt2'))"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, text=True, capture_output=True, timeout=60
    )
    assert result.returncode == 2 and result.stderr.startswith("error: 'openai-community/gpt2'")
    assert len(result.stderr.splitlines()) == 1


def test_one_copy_of_the_weights(tmp_path):
    """The peak while loading is the model and one tensor beyond the mapped file, not two models."""
    tensors = gpt2_tensors(vocab_size=512, n_embd=96)
    write_folder(tmp_path, gpt2_config(vocab_size=512, n_embd=96), tensors)
    mapped = (tmp_path / "model.safetensors").stat().st_size  # pages the kernel can drop
    peak = measure_peak(lambda: load_pretrained(GPT, tmp_path)) - mapped
    size = tensor_bytes(load_pretrained(GPT, tmp_path))
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert size <= peak <= size + largest


def test_shards_are_mapped_one_at_a_time(transformers, tmp_path, monkeypatch):
    """Beyond the model there is at most one shard in memory, and each is opened twice: its header,
    and then its tensors, whatever order the model has them in."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(file.name for file in tmp_path.glob("*-of-*.safetensors"))
    alive, opened, most = set(), [], 0
    original = SafetensorsWeights._open

    class Counted:
        def __init__(self, file):
            self.shard, self.number = original(file), len(opened)
            opened.append(file.name)
            alive.add(self.number)

        def __getattr__(self, name):
            nonlocal most
            most = max(most, len(alive))
            return getattr(self.shard, name)

        def __del__(self):
            alive.discard(self.number)

    monkeypatch.setattr(SafetensorsWeights, "_open", staticmethod(Counted))
    load_pretrained(GPT, tmp_path)
    assert len(shards) > 2 and sorted(opened) == sorted(2 * shards)
    assert most <= 2  # a header's is let go when the next one is read


@pytest.mark.slow
def test_a_folder_of_bfloat16_shards_is_read_with_one_copy(transformers, tmp_path):
    """The exact peak: the model in bfloat16, and one tensor; the mapped files are the kernel's."""
    torch.manual_seed(0)
    wide = dict(hidden_size=128, intermediate_size=256, vocab_size=512)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | wide)).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    files = list(tmp_path.glob("*-of-*.safetensors"))
    assert len(files) > 2
    mapped = 2 * sum(file.stat().st_size for file in files)  # headers', then tensors'
    peak = measure_peak(lambda: load_pretrained(GPT, tmp_path, dtype=torch.bfloat16))
    size = tensor_bytes(load_pretrained(GPT, tmp_path, dtype=torch.bfloat16))
    largest = max(p.nbytes for p in model.parameters())
    assert size <= peak <= size + largest + mapped
