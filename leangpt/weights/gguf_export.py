"""Our GPT as one GGUF file, llama.cpp's format, tokenizer and chat format included.

What is written is what gguf.py reads: the same pieces, the other way. Matrices are F32, F16 or Q8_0
(8-bit integers in blocks of 32 with a float16 scale, rounded to nearest), everything else F32. One
tensor at a time is converted, so that a file takes one tensor of memory beyond the model.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from leangpt.layers.rope import check_scaling, rope_frequencies
from leangpt.system.errors import UserError
from leangpt.system.whole_files import written_whole
from leangpt.text.text_files import GENERATION, SETTINGS, TEMPLATE, TOKENIZER, parse
from leangpt.text.tokenizer_json import CUTS, byte_level_bpe
from leangpt.weights.gguf import GPT2_NAMES, LLAMA_NAMES, ROPE_FACTORS
from leangpt.weights.hf_names import config_to_hf, gpt2_pieces, llama_pieces

KINDS = ("F32", "F16", "Q8_0")
GPT2_KEYS = {"attention.layer_norm_epsilon": "norm_eps"}
LLAMA_KEYS = {
    "attention.head_count_kv": "kv_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
}
KEYS = {
    "context_length": "block_size",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "inner",
    "attention.head_count": "n_head",
    "vocab_size": "vocab_size",
}


def export_gguf(model, file, kind="F16", text_files=None):
    """Write `model` to a .gguf `file`, matrices as `kind` -> a list of notes, lines of text.

    model: a GPT in any floating dtype, with plain weights (not int4). text_files: {name: content}
    of its tokenizer (text_files.py); one that GGUF has no name for is left out, with a note.
    Raises UserError, with nothing written, where llama.cpp has no such architecture, for packed
    weights, and where the folder or the disk does not take the file.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF files needs the gguf package: pip install gguf") from None
    if kind not in KINDS:
        raise UserError(f"GGUF weights are written as {', '.join(KINDS)}, not {kind!r}")
    family = architecture(model.config)
    tensors = their_tensors(model, family)
    with written_whole(Path(file), fsync=True) as temporary:
        writer = gguf.GGUFWriter(temporary, family)
        for key, attribute in (KEYS | (GPT2_KEYS if family == "gpt2" else LLAMA_KEYS)).items():
            value = getattr(model.config, attribute)
            if value is not None:
                add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
                add(f"{family}.{key}", value)
        writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")])
        add_rope_scaling(writer, model.config, family, tensors)
        notes = add_text(writer, gguf.TokenType, text_files or {}, model.config.vocab_size)
        kinds = {name: kind_of(tensor, kind) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            made = gguf.GGMLQuantizationType[kinds[name]]
            shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), made)
            wide = np.dtype({"F32": np.float32, "F16": np.float16}.get(kinds[name], np.uint8))
            shape = tuple(tensor.shape) if kinds[name] != "Q8_0" else shape
            size = int(np.prod(shape)) * wide.itemsize
            writer.add_tensor_info(name, shape, wide, size, made if wide == np.uint8 else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            numbers = tensor.detach().float().cpu().contiguous().numpy()
            made = gguf.GGMLQuantizationType[kinds[name]]
            writer.write_tensor_data(gguf.quants.quantize(numbers, made))
        writer.close()
    return notes


def architecture(config):
    """llama.cpp's name for a GPTConfig's family. UserError for what it cannot say."""
    scaling = config.rope_scaling
    if scaling and check_scaling(scaling) == "factors":  # which GGUF has, and config.json has not
        config = replace(config, rope_scaling=None)
    family = config_to_hf(config)["model_type"]
    if family == "gpt2" and config.mlp != "gelu_tanh":
        raise UserError(
            f"export: llama.cpp's GPT-2 needs mlp to be 'gelu_tanh', this model has {config.mlp!r}"
        )
    return "llama" if family == "mistral" else family


def their_tensors(model, family):
    """{name in the file: tensor} in the file's row order; a bias that we lack is zeros."""
    parameters, tensors = dict(model.named_parameters()), {}
    if family == "gpt2":
        pieces = gpt2_pieces(model.config, GPT2_NAMES, conv1d=False)
    else:
        pieces = llama_pieces(model.config, LLAMA_NAMES, paired=family == "llama")
    for piece in pieces:
        weight = parameters.get(
            piece.ours.removesuffix(".bias").removesuffix(".weight") + ".weight"
        )
        if weight is None:
            raise UserError(
                "export: this model's weights are packed (int4); export the float model instead"
            )
        tensor = parameters.get(piece.ours)
        tensor = weight.new_zeros(weight.size(0)) if tensor is None else tensor.detach()
        if piece.rows is not None:
            tensor = tensor[piece.rows[0] : piece.rows[1]]
        if piece.paired_heads:
            tensor = pairs_together(tensor, piece.paired_heads)
        tensors[piece.theirs] = tensor
    return tensors


def pairs_together(weight, n_head):
    """Rows (n_head D, ...) with rotary pairs (i, i + D/2) reordered to pairs (2i, 2i+1)."""
    rows, *rest = weight.shape
    return weight.view(n_head, 2, rows // n_head // 2, *rest).transpose(1, 2).reshape(rows, *rest)


def kind_of(tensor, kind):
    """How a tensor is stored: vectors in F32, rows that are no whole blocks of 32 in F16."""
    if tensor.ndim < 2:
        return "F32"
    return "F16" if kind == "Q8_0" and tensor.shape[-1] % 32 else kind


def add_rope_scaling(writer, config, family, tensors):
    """Rope's scaling: a factor, or divisors of the frequencies among the tensors."""
    name = check_scaling(config.rope_scaling)
    if name == "linear":
        writer.add_string(f"{family}.rope.scaling.type", "linear")
        writer.add_float32(f"{family}.rope.scaling.factor", float(config.rope_scaling["factor"]))
    elif name != "default":
        plain = rope_frequencies(config.head_dim, config.rope_theta)
        scaled = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        tensors[ROPE_FACTORS] = plain / scaled


def add_text(writer, types, files, vocab_size):
    """The tokenizer's vocabulary, special tokens and chat format -> notes."""
    found = parse(files, TOKENIZER, "the tokenizer")
    model = found.get("model") or {}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    added = found.get("added_tokens") or []
    special = [token["content"] for token in added if token["special"]]
    whole = [token["content"] for token in added if not token["special"]]
    cut = cut_of(found) if model.get("type") == "BPE" and model.get("vocab") else None
    if cut is None:
        return ["without a tokenizer, for which GGUF has no name: keep tokenizer.json beside it"]
    vocabulary = model["vocab"] | {token["content"]: token["id"] for token in added}
    names = {i: text for text, i in vocabulary.items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(max(vocab_size, max(names) + 1))]
    kinds = {**dict.fromkeys(special, types.CONTROL), **dict.fromkeys(whole, types.USER_DEFINED)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    unused = [types.NORMAL if i in names else types.UNUSED for i in range(len(tokens))]
    writer.add_token_types([kinds.get(t, kind) for t, kind in zip(tokens, unused)])
    writer.add_token_merges(merges)
    settings = parse(files, SETTINGS, "the tokenizer")
    ends = parse(files, GENERATION, "the tokenizer").get("eos_token_id")
    if ends is not None:
        writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if bos in vocabulary:
        writer.add_bos_token_id(vocabulary[bos])
    template = files.get(TEMPLATE, settings.get("chat_template"))
    if isinstance(template, str):
        writer.add_chat_template(template)
    more = isinstance(ends, list) and len(ends) > 1
    return [f"of {len(ends)} tokens that end a text the file names the first"] if more else []


def cut_of(tokenizer):
    """GGUF's name for the way in which a byte-level tokenizer.json cuts text, or None."""
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # NFC is Qwen's, which llama.cpp leaves out as well
        return None
    wanted = cutters(tokenizer.get("pre_tokenizer"))
    for cut in CUTS:
        if cutters(json.loads(byte_level_bpe({}, [], cut))["pre_tokenizer"]) == wanted:
            return cut
    return None


def cutters(entry):
    """What the pre_tokenizer of a tokenizer.json does, step by step, defaults filled in."""
    entry = entry or {}
    if entry.get("type") == "Sequence":
        return [step for part in entry["pretokenizers"] for step in cutters(part)]
    if entry.get("type") == "ByteLevel":
        entry = {"type": "ByteLevel", "use_regex": True, **entry}
    return [{name: value for name, value in entry.items() if name != "trim_offsets"}]
