"""GGUF files: a tiny Llama and a tiny GPT-2 written by the gguf package, in every row order and
block format that matters, give the logits of the same weights in a Hugging Face folder."""

import numpy as np
import pytest
import torch
from pretrained_files import gpt2_config, gpt2_tensors, write_folder

from leangpt.system.errors import UserError
from leangpt.weights.gguf import GPT2_NAMES, LLAMA_NAMES, round_float32
from leangpt.weights.hf_names import GPT2_NAMES as HF_GPT2
from leangpt.weights.hf_names import LLAMA_NAMES as HF_LLAMA
from leangpt.weights.load import halves_apart, load_pretrained
from model import GPT

gguf = pytest.importorskip("gguf")
C, F, H, G, L, V = 64, 96, 4, 2, 2, 40
HF_CONFIG = dict(
    model_type="llama",
    vocab_size=V,
    hidden_size=C,
    intermediate_size=F,
    num_hidden_layers=L,
    num_attention_heads=H,
    num_key_value_heads=G,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_theta=100000.0,
)


def llama_tensors():
    """A random Llama with Hugging Face's names."""
    generator = torch.Generator().manual_seed(0)
    kv = C // H * G
    shapes = {
        "wte": (V, C),
        "ln_f": (C,),
        "head": (V, C),
        "ln_1": (C,),
        "q": (C, C),
        "k": (kv, C),
        "v": (kv, C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "gate": (F, C),
        "up": (F, C),
        "mlp.c_proj": (C, F),
    }
    tensors = {}
    for role in shapes:
        name = HF_LLAMA[role]
        for i in range(L if "{i}" in name else 1):
            tensors[name.format(i=i) + ".weight"] = 0.3 * torch.randn(
                *shapes[role], generator=generator
            )
    return tensors


def pairs_together(weight, heads):
    """llama.cpp's order of q and k: row 2i of a head is our row i, row 2i+1 our row i + D/2."""
    D = weight.shape[0] // heads
    order = [
        h * D + i + half * D // 2 for h in range(heads) for i in range(D // 2) for half in (0, 1)
    ]
    return weight[order]


def write_gguf(path, arch, tensors, metadata, quantise=None):
    """Write tensors {name: float tensor} and metadata {key: int|float|str|list} to one file."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        key = (
            key if "." in key and key.split(".")[0] in ("tokenizer", "general") else f"{arch}.{key}"
        )
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        numbers = tensor.float().numpy()
        if quantise is not None and numbers.ndim == 2:
            packed = gguf.quants.quantize(numbers, quantise)
            writer.add_tensor(name, packed, raw_dtype=quantise)
        else:
            writer.add_tensor(name, np.ascontiguousarray(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA_METADATA = {
    "context_length": 64,
    "embedding_length": C,
    "feed_forward_length": F,
    "block_count": L,
    "attention.head_count": H,
    "attention.head_count_kv": G,
    "rope.freq_base": 100000.0,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": C // H,
}


def gguf_llama(path, changes=None, damage=None, quantise=None):
    tensors = {}
    for role, theirs in HF_LLAMA.items():
        for i in range(0 if "_norm" in role else L if "{i}" in theirs else 1):
            tensor = llama_tensors()[theirs.format(i=i) + ".weight"]
            if role in ("q", "k"):
                tensor = pairs_together(tensor, H if role == "q" else G)
            tensors[LLAMA_NAMES[role].format(i=i) + ".weight"] = tensor
    if damage:
        damage(tensors)
    return write_gguf(path, "llama", tensors, {**LLAMA_METADATA, **(changes or {})}, quantise)


def logits(model, vocab_size=V, length=16):
    idx = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(idx)[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    return logits(load_pretrained(GPT, write_folder(folder, HF_CONFIG, llama_tensors())))


def test_llama_equals_the_hugging_face_folder(tmp_path, expected):
    file = gguf_llama(tmp_path / "tiny.gguf")
    for place in (file, tmp_path):  # the file, or the folder that holds it alone
        model = load_pretrained(GPT, place)
        torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)
    assert model.config.norm_eps == 1e-5 and model.config.kv_heads == G
    gguf_llama(tmp_path / "second.gguf")
    with pytest.raises(UserError, match="several GGUF files"):
        load_pretrained(GPT, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        dict(q_chunk=5),
        dict(attention_policy="grouped"),
        dict(attention_policy="recompute", q_chunk=5, k_chunk=3),
    ],
)
def test_every_policy_runs_the_weights(tmp_path, expected, settings):
    model = load_pretrained(GPT, gguf_llama(tmp_path / "tiny.gguf"), **settings)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_row_order_matters():
    weight = torch.randn(C, C)
    paired = pairs_together(weight, H)
    assert not torch.equal(paired, weight)
    assert torch.equal(halves_apart(paired, H), weight)


@pytest.mark.parametrize("kind, tolerance", [("F16", 3e-4), ("Q8_0", 0.01), ("Q4_1", 0.1)])
def test_block_formats(tmp_path, kind, tolerance):
    file = gguf_llama(tmp_path / "tiny.gguf", quantise=gguf.GGMLQuantizationType[kind])
    model, tensors = load_pretrained(GPT, file), llama_tensors()
    for name in ("q", "k", "v"):
        truth = tensors[f"layers.1.self_attn.{name}_proj.weight"]
        start = {"q": 0, "k": C, "v": C + C // H * G}[name]
        rows = model.transformer.h[1].attn.c_attn.weight[start : start + len(truth)]
        assert 0 < (rows - truth).norm() / truth.norm() < tolerance, name


def test_tied_head_is_one_that_is_absent(tmp_path):
    file = gguf_llama(tmp_path / "tiny.gguf", damage=lambda t: t.pop("output.weight"))
    model = load_pretrained(GPT, file)
    assert model.config.tie_embeddings and model.lm_head.weight is model.transformer.wte.weight


def test_rope_factors_are_llama3(tmp_path):
    """The frequency divisors of a Llama 3 file give what the same rule in a config.json gives."""
    from leangpt.layers.rope import rope_frequencies

    scaling = dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )
    factors = rope_frequencies(C // H, 1e5) / rope_frequencies(C // H, 1e5, scaling)
    file = gguf_llama(
        tmp_path / "tiny.gguf", damage=lambda t: t.update({"rope_freqs.weight": factors})
    )
    hf = {key: value for key, value in HF_CONFIG.items() if key != "rope_theta"}
    hf["rope_parameters"] = {**scaling, "rope_theta": 100000.0}
    folder = write_folder(tmp_path / "hf", hf, llama_tensors())
    torch.testing.assert_close(
        logits(load_pretrained(GPT, file)),
        logits(load_pretrained(GPT, folder)),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "keys, factor",
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),  # older files
        ({"rope.scaling.factor": 4.0}, 4.0),  # linear is the default
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, 4.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scaling.factor": 0.0}, None),
    ],
    ids=str,
)
def test_linear_rope_by_every_key(tmp_path, keys, factor):
    ours = load_pretrained(GPT, gguf_llama(tmp_path / "tiny.gguf", changes=keys))
    hf = dict(HF_CONFIG)
    if factor:
        hf["rope_scaling"] = {"type": "linear", "factor": factor}
    theirs = load_pretrained(GPT, write_folder(tmp_path / "hf", hf, llama_tensors()))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-6, rtol=1e-6)


def test_rope_factors_and_a_linear_one_multiply(tmp_path):
    def freqs(tensors):
        tensors["rope_freqs.weight"] = torch.full((C // H // 2,), 2.0)

    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    model = load_pretrained(GPT, gguf_llama(tmp_path / "tiny.gguf", keys, freqs))
    assert model.config.rope_scaling["factors"] == [4.0] * (C // H // 2)


def test_gpt2_equals_the_hugging_face_folder(tmp_path):
    tensors, config = gpt2_tensors(), gpt2_config()
    folder = write_folder(tmp_path / "hf", config, tensors)
    renamed = {}
    for role, theirs in HF_GPT2.items():
        for i in range(2 if "{i}" in theirs else 1):
            for part in (".weight", ".bias"):
                tensor = tensors.get(theirs.format(i=i) + part)
                if tensor is not None:
                    linear = part == ".weight" and role.split(".")[0] in ("attn", "mlp")
                    name = GPT2_NAMES[role].format(i=i) + part
                    renamed[name] = tensor.t() if linear else tensor
    metadata = {
        "context_length": 16,
        "embedding_length": 24,
        "feed_forward_length": 96,
        "block_count": 2,
        "attention.head_count": 3,
        "attention.layer_norm_epsilon": 1e-5,
    }
    file = write_gguf(tmp_path / "gpt2.gguf", "gpt2", renamed, metadata)
    torch.testing.assert_close(
        logits(load_pretrained(GPT, file), 61),
        logits(load_pretrained(GPT, folder), 61),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "changes, damage, words",
    [
        ({"attention.head_count": 8, "rope.dimension_count": 8}, None, r"attn_k.weight has shape"),
        ({"rope.dimension_count": 8}, None, "rope.dimension_count=8"),
        ({"rope.scaling.type": "yarn"}, None, "yarn"),
        ({"expert_count": 4}, None, "experts"),
        ({"block_count": 0}, None, "block_count"),
        ({}, lambda t: t.pop("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight is missing"),
        ({}, lambda t: t.pop("token_embd.weight"), "token_embd.weight is missing"),
        ({}, lambda t: t.update({"blk.0.attn_q.bias": torch.ones(C)}), "attn_q.bias is not part"),
        ({}, lambda t: t.update({"output_norm.weight": torch.ones(3)}), r"\[3\].*\[64\]"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, damage, words):
    file = gguf_llama(tmp_path / "tiny.gguf", changes, damage)
    with pytest.raises(UserError, match=words):
        load_pretrained(GPT, file)


def test_other_architectures_are_named(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", "mamba", {"a": torch.ones(4)}, {"block_count": 1})
    with pytest.raises(UserError, match="'mamba' is not supported"):
        load_pretrained(GPT, file)


def test_damaged_and_partial_files(tmp_path):
    file = gguf_llama(tmp_path / "tiny.gguf")
    whole = file.read_bytes()
    for damaged in (b"", whole[:3], b"nonsense" * 20, whole[:200], whole[:-4000]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="tiny.gguf"):
            load_pretrained(GPT, file)


def test_float32_metadata_is_read_as_written():
    assert round_float32(float(np.float32(1e-5))) == 1e-5
    assert round_float32(float(np.float32(100000.0))) == 100000.0


def toy_vocabulary():
    """Bytes, two merges and two control tokens, as llama.cpp stores a byte-level BPE."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|im_start|>", "<|im_end|>", *letters, "he", "Ġhe"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["h e", "Ġ he"],
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
    }
