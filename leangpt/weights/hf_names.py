"""Files of GPT-2's and Llama's families as Hugging Face writes them: settings, names, and ours.

`config_from_hf` and `config_to_hf` translate a config.json; the `*_pieces` functions say which
rows of which of our parameters each foreign tensor holds. Reading and writing both walk the same
list of pieces, so what is exported is what would be loaded.
"""

import math
from dataclasses import dataclass

from leangpt.layers.rope import check_scaling
from leangpt.system.errors import UserError

GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Llama's family: what sets a member apart in GPTConfig, and what its config.json may leave out
LLAMA_LIKE = {
    "llama": (dict(), dict(max_position_embeddings=2048)),
    "mistral": (
        dict(),
        dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    ),
    "qwen2": (dict(qkv_bias=True), dict(max_position_embeddings=32768, num_key_value_heads=32)),
    "qwen3": (
        dict(qk_norm=True),
        dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128),
    ),
}
SUPPORTED = f"the supported families: gpt2, {', '.join(LLAMA_LIKE)}"


@dataclass(frozen=True)
class Piece:
    """One tensor of a foreign file and the place of its numbers in our model."""

    theirs: str  # name in the file, without the "transformer." or "model." in front
    ours: str  # parameter of GPT
    rows: tuple[int, int] | None = None  # rows [start, end) of ours; None = all of it
    transposed: bool = False  # theirs is (in, out), as GPT-2's Conv1D keeps it
    paired_heads: int | None = None  # theirs has so many heads whose rotary pairs are neighbours


# Names by role. {i} is the layer. Left: ours, below the prefix `transformer.`
GPT2_NAMES = {
    "wte": "wte",
    "wpe": "wpe",
    "ln_f": "ln_f",
    "ln_1": "h.{i}.ln_1",
    "attn.c_attn": "h.{i}.attn.c_attn",
    "attn.c_proj": "h.{i}.attn.c_proj",
    "ln_2": "h.{i}.ln_2",
    "mlp.c_fc": "h.{i}.mlp.c_fc",
    "mlp.c_proj": "h.{i}.mlp.c_proj",
    "head": "lm_head",
}
LLAMA_NAMES = {
    "wte": "embed_tokens",
    "ln_f": "norm",
    "ln_1": "layers.{i}.input_layernorm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "attn.q_norm": "layers.{i}.self_attn.q_norm",
    "attn.k_norm": "layers.{i}.self_attn.k_norm",
    "attn.c_proj": "layers.{i}.self_attn.o_proj",
    "ln_2": "layers.{i}.post_attention_layernorm",
    "gate": "layers.{i}.mlp.gate_proj",
    "up": "layers.{i}.mlp.up_proj",
    "mlp.c_proj": "layers.{i}.mlp.down_proj",
    "head": "lm_head",
}


# What a config.json says that ours says too: its key, and the attribute of GPTConfig.
GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_inner": "inner",
    "layer_norm_epsilon": "norm_eps",
    "resid_pdrop": "dropout",
    "embd_pdrop": "dropout",
    "tie_word_embeddings": "tie_embeddings",
}
LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "hidden_size": "n_embd",
    "intermediate_size": "inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "tie_word_embeddings": "tie_embeddings",
}


def gpt2_pieces(config, names=GPT2_NAMES, conv1d=True):
    """Pieces of a GPT-2 with biases; `conv1d` says that linear weights lie transposed (in, out)."""
    yield Piece(f"{names['wte']}.weight", "transformer.wte.weight")
    yield Piece(f"{names['wpe']}.weight", "transformer.wpe.weight")
    for i in range(config.n_layer):
        for role in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            theirs, ours = names[role].format(i=i), f"transformer.h.{i}.{role}"
            linear = not role.startswith("ln")
            yield Piece(f"{theirs}.weight", f"{ours}.weight", transposed=conv1d and linear)
            yield Piece(f"{theirs}.bias", f"{ours}.bias")
    yield Piece(f"{names['ln_f']}.weight", "transformer.ln_f.weight")
    yield Piece(f"{names['ln_f']}.bias", "transformer.ln_f.bias")
    if not config.tie_embeddings:
        yield Piece(f"{names['head']}.weight", "lm_head.weight")


def llama_pieces(config, names=LLAMA_NAMES, paired=False):
    """Pieces of a Llama; q, k, v are rows of our c_attn, and gate, up are rows of our c_fc.

    `paired` says that the rows of q and k have rotary pairs side by side (GGUF's order for Llama).
    """
    q, kv, F = config.n_head * config.head_dim, config.kv_heads * config.head_dim, config.inner
    stacked = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    heads = {"q": config.n_head, "k": config.kv_heads} if paired else {}
    norms = ("attn.q_norm", "attn.k_norm") if config.qk_norm else ()
    yield Piece(f"{names['wte']}.weight", "transformer.wte.weight")
    for i in range(config.n_layer):
        h = f"transformer.h.{i}."

        def piece(role, ours, rows=None, heads=None, leaf="weight", i=i, h=h):
            theirs = f"{names[role].format(i=i)}.{leaf}"
            return Piece(theirs, f"{h}{ours}.{leaf}", rows, paired_heads=heads)

        yield piece("ln_1", "ln_1")
        for part, rows in stacked.items():
            yield piece(part, "attn.c_attn", rows, heads.get(part))
            if config.qkv_bias:
                yield piece(part, "attn.c_attn", rows, heads.get(part), "bias")
        yield from (piece(norm, norm) for norm in norms)
        yield piece("attn.c_proj", "attn.c_proj")
        yield piece("ln_2", "ln_2")
        yield piece("gate", "mlp.c_fc", (0, F))
        yield piece("up", "mlp.c_fc", (F, 2 * F))
        yield piece("mlp.c_proj", "mlp.c_proj")
    yield Piece(f"{names['ln_f']}.weight", "transformer.ln_f.weight")
    if not config.tie_embeddings:
        yield Piece(f"{names['head']}.weight", "lm_head.weight")


def hf_pieces(config):
    """Pieces of a Hugging Face file for a model of this GPTConfig."""
    return list(gpt2_pieces(config) if config.position == "learned" else llama_pieces(config))


def need(settings, key, where):
    """settings[key] as a positive int; UserError where it is missing or something else."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} must be a positive whole number, not {value!r}")
    return value


def _positive(settings, key, default, where):
    """settings[key], or default where it is absent, as a float above 0; UserError otherwise."""
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} must be a positive number, not {value!r}")
    return float(value)


def config_from_hf(hf, where="config.json"):
    """Arguments of GPTConfig for a Hugging Face config dict (absent keys: the family's defaults).

    Raises UserError, beginning with `where`, for another architecture or a feature we lack.
    """
    family = hf.get("model_type")
    if hf.get("quantization_config"):
        raise UserError(f"{where}: the weights are quantised; use the unquantised safetensors")
    if family == "gpt2":
        return _gpt2_config(hf, where)
    if isinstance(family, str) and family in LLAMA_LIKE:
        return _llama_config(hf, where, *LLAMA_LIKE[family])
    raise UserError(f"{where}: architecture {family!r} is not supported; {SUPPORTED}")


def _require(hf, where, **expected):
    """UserError naming the first key of hf that is present with a value other than expected.

    null is a no where a yes or no is expected, and elsewhere as good as absent.
    """
    for key, value in expected.items():
        found = _yes(hf, key, value) if isinstance(value, bool) else hf.get(key)
        if found is not None and found != value:
            raise UserError(f"{where}: {key}={hf[key]!r} is not supported, only {value!r}")


def _yes(hf, key, default):
    """hf[key], where null is a no."""
    found = hf.get(key, default)
    return False if found is None else found


def _gpt2_config(hf, where):
    _require(
        hf,
        where,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    activation = hf.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in GPT2_ACTIVATIONS:
        known = ", ".join(GPT2_ACTIVATIONS)
        raise UserError(f"{where}: activation_function {activation!r} is not one of {known}")
    positions = "n_positions" if "n_positions" in hf else "n_ctx"
    width = need(hf, "n_embd", where)
    return dict(
        block_size=need(hf, positions, where),
        vocab_size=need(hf, "vocab_size", where),
        n_layer=need(hf, "n_layer", where),
        n_head=need(hf, "n_head", where),
        n_kv_head=need(hf, "n_head", where),
        n_embd=width,
        n_inner=need(hf, "n_inner", where) if hf.get("n_inner") else 4 * width,
        bias=True,
        position="learned",
        norm="layernorm",
        norm_eps=_positive(hf, "layer_norm_epsilon", 1e-5, where),
        mlp=GPT2_ACTIVATIONS[activation],
        tie_embeddings=_yes(hf, "tie_word_embeddings", True),
    )


def _llama_config(hf, where, apart, absent):
    """As config_from_hf for a member of Llama's family, whose entry in LLAMA_LIKE this is."""
    hf = {**absent, **hf}
    n_head, n_embd = need(hf, "num_attention_heads", where), need(hf, "hidden_size", where)
    context = need(hf, "max_position_embeddings", where)
    _require(
        hf,
        where,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        partial_rotary_factor=1.0,
        dual_chunk_attention_config=None,
    )
    head_dim = None if hf.get("head_dim") is None else need(hf, "head_dim", where)
    if head_dim is None and n_embd % n_head:
        raise UserError(f"{where}: num_attention_heads={n_head} does not divide {n_embd=}")
    window = _sliding_window(hf, where)
    # transformers 5 keeps everything about rope in one dict, older files in two keys
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: the rope settings must be an object, not {rope!r}")
    theta = _positive(
        {"rope_theta": hf.get("rope_theta", 10000.0), **rope}, "rope_theta", None, where
    )
    rope = {key: value for key, value in rope.items() if key != "rope_theta"}
    _require(rope, where, partial_rotary_factor=1.0)
    if rope.get("rope_type", rope.get("type")) == "llama3":  # its one optional key
        rope = {"original_max_position_embeddings": context} | rope
    try:
        scaling = None if check_scaling(rope) == "default" else rope
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return apart | dict(
        # attention beyond a window is nothing we have: the model reads that much
        block_size=min(context, window or context),
        sliding_window=window,
        vocab_size=need(hf, "vocab_size", where),
        n_layer=need(hf, "num_hidden_layers", where),
        n_head=n_head,
        n_kv_head=need(
            {**hf, "num_key_value_heads": hf.get("num_key_value_heads") or n_head},
            "num_key_value_heads",
            where,
        ),
        n_head_dim=None if head_dim is None or head_dim * n_head == n_embd else head_dim,
        n_embd=n_embd,
        n_inner=need(hf, "intermediate_size", where),
        bias=False,
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        norm="rmsnorm",
        norm_eps=_positive(hf, "rms_norm_eps", 1e-6, where),
        mlp="swiglu",
        tie_embeddings=_yes(hf, "tie_word_embeddings", False),
    )


def _sliding_window(hf, where):
    """How many tokens attention sees in some layers, or None where all layers see all."""
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or set(map(str, kinds)) - {
        "full_attention",
        "sliding_attention",
    }:
        raise UserError(f"{where}: layer_types={kinds!r} is not supported, only full attention")
    if not hf.get("use_sliding_window", True) or kinds and "sliding_attention" not in kinds:
        return None
    if hf.get("model_type", "").startswith("qwen") and "use_sliding_window" not in hf:
        return None  # Qwen's default
    return None if hf.get("sliding_window") is None else need(hf, "sliding_window", where)


def config_to_hf(config):
    """The Hugging Face config dict of a GPTConfig.

    Two shapes can be said there: GPT-2's (LayerNorm, learned positions, GELU, as many key/value
    heads as heads) and Llama's (RMSNorm, RoPE, SwiGLU, no biases), whose members LLAMA_LIKE tells
    apart. UserError names what differs.
    """
    if config.position == "learned":
        _expressible(
            config,
            "GPT-2",
            norm="layernorm",
            kv_heads=config.n_head,
            mlp=("gelu", "gelu_tanh"),
            qk_norm=False,
            n_head_dim=(None, config.n_embd / config.n_head),
            sliding_window=None,
        )
        attention_dropout = config.attention_dropout
        names, rest = (
            GPT2_KEYS,
            dict(
                architectures=["GPT2LMHeadModel"],
                model_type="gpt2",
                activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.mlp],
                attn_pdrop=config.dropout if attention_dropout is None else attention_dropout,
            ),
        )
    else:
        _expressible(config, "Llama", position="rope", norm="rmsnorm", mlp="swiglu", bias=False)
        if config.rope_scaling and check_scaling(config.rope_scaling) == "factors":
            raise UserError("export: rope_scaling 'factors' cannot be said in a Llama config.json")
        names, rest = LLAMA_KEYS, _llama_to_hf(config)
    return rest | {theirs: getattr(config, ours) for theirs, ours in names.items()}


def _llama_to_hf(config):
    """What the config.json of a member of Llama's family says beside LLAMA_KEYS."""
    window = config.sliding_window
    family = "mistral" if window else "llama"
    if config.qk_norm or config.qkv_bias:
        family = "qwen3" if config.qk_norm else "qwen2"
        _expressible(config, family.capitalize(), qkv_bias=not config.qk_norm)
    rest = dict(
        architectures=[f"{family.capitalize()}ForCausalLM"], model_type=family, hidden_act="silu"
    )
    if family in ("llama", "qwen3"):
        rest["attention_bias"] = False
    if family == "llama":
        rest["mlp_bias"] = False
    if family == "qwen3" or config.head_dim * config.n_head != config.n_embd:
        rest["head_dim"] = config.head_dim
    if family != "llama":  # whose absent key means another number
        rest["sliding_window"] = window
    if family.startswith("qwen"):
        rest |= dict(use_sliding_window=bool(window), max_window_layers=0)
    return rest


def _expressible(config, family, **expected):
    for key, allowed in expected.items():
        value = getattr(config, key)
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        if value not in allowed:
            wanted = " or ".join(repr(a) for a in allowed)
            raise UserError(
                f"export: transformers' {family} needs {key} to be {wanted}, and this "
                f"model has {value!r}"
            )
