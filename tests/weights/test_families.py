"""Models of every supported family, tiny, as transformers writes them: logits, gradients, steps."""

import pytest
import torch

from leangpt.decoding import step_cpu
from leangpt.kv_cache.cache import build_cache
from leangpt.system.errors import UserError
from leangpt.weights.export import export_pretrained
from leangpt.weights.load import load_pretrained
from model import GPT

transformers = pytest.importorskip("transformers")
# of float32 logits around 5, by either: 1.7e-5 on the lowest processor, and a wrong angle 1e-2
ROUNDING = dict(atol=5e-5, rtol=1e-5)
V, T = 67, 40
SMALL = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
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
FAMILIES = {
    "llama3.2-tied": ("Llama", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "llama-wide-heads": ("Llama", dict(head_dim=16)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral-nemo": ("Mistral", dict(sliding_window=None, head_dim=4)),
    "mistral-window": ("Mistral", dict(sliding_window=T)),
    "qwen2": ("Qwen2", dict()),
    "qwen2.5-tied": ("Qwen2", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=T, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3-tied": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True, num_key_value_heads=4)),
    "qwen3-narrow": ("Qwen3", dict(head_dim=10)),  # 40 numbers of 32, no multiple of 16
}
PATHS = {
    "plain": dict(),
    "tiled": dict(q_chunk=12, k_chunk=5),
    "recompute": dict(attention_policy="recompute", q_chunk=12, k_chunk=5, checkpoint_layers=True),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(a model of transformers, the folder it wrote), norms and biases far from their start."""
    name, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**SMALL | changes)
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


def tokens(length=T):
    return torch.randint(V, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def their_logits(model):
    logits = model(tokens()).logits
    assert logits.std() > 0.1  # logits that say something
    return logits


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
def test_logits(pair, options):
    model, folder = pair
    ours = load_pretrained(GPT, folder, **options)
    with torch.no_grad():
        logits = ours(tokens())[0]
    torch.testing.assert_close(logits, their_logits(model), **ROUNDING)


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
def test_gradients(pair, options, tmp_path):
    """Of the mean loss, for every tensor of the file: ours are exported to have their names."""
    model, folder = pair
    model.zero_grad()
    logits = model(tokens()).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    ours = load_pretrained(GPT, folder, **options).train()
    targets = tokens().roll(-1, 1)
    targets[:, -1] = -100
    ours(tokens(), targets)[1].backward()
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(p.grad)
    ours.config.attention_policy = "cache"
    export_pretrained(ours, tmp_path)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert grad.abs().max() > 1e-4 or "k_proj.bias" in name  # which softmax does not see
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def steps(model, cache, idx, native=False):
    """Logits of the last tokens of idx, one step each after a prefill of 30."""
    model.prefill(idx[:, :30], cache)
    step = step_cpu.Step(model, cache) if native else model.decode_one_token
    return torch.stack([step(idx[:, i : i + 1], cache) for i in range(30, idx.size(1))], 1)


@pytest.mark.parametrize("policy", ["cache", "recompute"])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_decoding_steps(pair, policy, kv_bits):
    model, folder = pair
    ours = load_pretrained(GPT, folder, attention_policy=policy)
    cache = build_cache(ours.config, 2, T, kv_bits=kv_bits)
    found, expected = steps(ours, cache, tokens()), their_logits(model)[:, 30:]
    if kv_bits is None:
        torch.testing.assert_close(found, expected, **ROUNDING)
    else:
        assert 0 < (found - expected).norm() / expected.norm() < 0.02


def test_the_step_in_c_falls_back_or_is_right(pair):
    model, folder = pair
    ours = load_pretrained(GPT, folder)
    cache = build_cache(ours.config, 1, T)
    expected = their_logits(model)[:1, 30:]
    if step_cpu.supports(ours, cache):
        found = steps(ours, cache, tokens()[:1], native=True)
        torch.testing.assert_close(found, expected, **ROUNDING)
    else:
        assert step_cpu.library() is None or ours.config.head_dim % 16


def test_exported_back(pair, tmp_path):
    model, folder = pair
    export_pretrained(load_pretrained(GPT, folder), tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    windowless = "Mistral" in type(model).__name__ and model.config.sliding_window is None
    assert again.config.model_type == ("llama" if windowless else model.config.model_type)
    torch.testing.assert_close(their_logits(again.eval()), their_logits(model), atol=0, rtol=0)


def test_a_window_bounds_the_context(tmp_path):
    config = transformers.MistralConfig(**SMALL | dict(sliding_window=24))
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ours = load_pretrained(GPT, tmp_path)
    assert ours.config.block_size == 24
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(24))[0], model(tokens(24)).logits, **ROUNDING)
        with pytest.raises(UserError, match="25 tokens do not fit block_size=24"):
            ours(tokens(25))
    with pytest.raises(UserError, match="sliding window of 24 tokens is not supported"):
        load_pretrained(GPT, tmp_path, block_size=25)
    # decoding rolls, and each layer sees the newest 24 tokens: that is what a window is
    cache = build_cache(ours.config, 2, 24)
    with torch.no_grad():
        ours.prefill(tokens()[:, :20], cache)
        found = [ours.decode_one_token(tokens()[:, i : i + 1], cache) for i in range(20, T)]
    torch.testing.assert_close(torch.stack(found, 1), their_logits(model)[:, 20:], **ROUNDING)
