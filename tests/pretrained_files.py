"""Tiny foreign models for the tests: folders as Hugging Face writes them, and GGUF files."""

import json

import torch
from safetensors.torch import save_file


def gpt2_tensors(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, prefix=""):
    """A random GPT-2 state dict with the hub's names and shapes (Conv1D is (in, out))."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    C = n_embd
    tensors = {"wte.weight": random(vocab_size, C), "wpe.weight": random(n_positions, C)}
    for i in range(n_layer):
        shapes = {
            "ln_1.weight": (C,),
            "ln_1.bias": (C,),
            "ln_2.weight": (C,),
            "ln_2.bias": (C,),
            "attn.c_attn.weight": (C, 3 * C),
            "attn.c_attn.bias": (3 * C,),
            "attn.c_proj.weight": (C, C),
            "attn.c_proj.bias": (C,),
            "mlp.c_fc.weight": (C, 4 * C),
            "mlp.c_fc.bias": (4 * C,),
            "mlp.c_proj.weight": (4 * C, C),
            "mlp.c_proj.bias": (C,),
        }
        tensors |= {f"h.{i}.{name}": random(*shape) for name, shape in shapes.items()}
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, n_positions, n_positions).tril()
    tensors |= {"ln_f.weight": random(C), "ln_f.bias": random(C)}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def gpt2_config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3):
    """The config.json that goes with gpt2_tensors, with the keys the hub's file has."""
    return dict(
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        vocab_size=vocab_size,
        n_ctx=n_positions,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        eos_token_id=50256,
    )


def write_folder(path, config, tensors):
    """A folder with config.json and model.safetensors; returns its path."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_model(path, first=None):
    """A folder with a tiny Llama, a byte-level tokenizer of its own, and a chat format.

    first: another alphabet, in which this letter comes before all others.
    """
    from tokenizers import pre_tokenizers

    from leangpt.text.tokenizer_json import byte_level_bpe
    from leangpt.weights.export import export_pretrained
    from model import GPT, GPTConfig

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (c != first, c))
    tokens = ["<|im_start|>", "<|im_end|>", *letters, "he", "Ġhe", "Ġsa"]
    merges = [("h", "e"), ("Ġ", "he"), ("Ġ", "s"), ("Ġs", "a")]
    tokens.insert(-1, "Ġs")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    torch.manual_seed(0)
    shape = dict(block_size=64, vocab_size=len(tokens) + 7, n_layer=2, n_head=4, n_embd=32)
    llama = dict(position="rope", norm="rmsnorm", mlp="swiglu", n_inner=64, tie_embeddings=False)
    model = GPT(GPTConfig(**shape, **llama))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    export_pretrained(model, path)
    content = byte_level_bpe(vocabulary, merges, special=tokens[:2])
    (path / "tokenizer.json").write_text(content, encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    settings |= {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return path
