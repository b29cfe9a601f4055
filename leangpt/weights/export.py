"""Our GPT as a Hugging Face folder: safetensors and a config.json that `transformers` loads.

GPT-2-shaped models become GPT2LMHeadModel, Llama-shaped ones LlamaForCausalLM (or Mistral's,
Qwen2's, Qwen3's), with the same logits; what none can express is an error that names the setting.
"""

import contextlib
import json
from pathlib import Path

from leangpt.system.errors import UserError
from leangpt.system.whole_files import written_whole
from leangpt.weights.hf_names import config_to_hf, hf_pieces

SHARD_BYTES = 5 * 2**30


def export_pretrained(model, directory):
    """Write `directory`/config.json and model.safetensors (shards and index beyond 5 GiB).

    model: a GPT in any floating dtype, with plain weights (not int4). Returns the directory as a
    Path; the tokenizer's files are chat_text.copy_text_files's business.
    Raises UserError, with nothing written, where transformers has no such architecture, and where
    the folder or the disk does not take it.
    """
    config = config_to_hf(model.config)
    tensors = _their_tensors(model, config["model_type"])
    config["torch_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"export: {directory} is a file, not a folder")
    shards = _shards(tensors)
    index_file = directory / "model.safetensors.index.json"
    with contextlib.ExitStack() as files:  # all get their names at the end, the last here first
        _write_json(files.enter_context(written_whole(directory / "config.json")), config)
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            total = sum(_bytes(tensor) for tensor in tensors.values())
            _write_json(
                files.enter_context(written_whole(index_file)),
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        for file, names in shards.items():
            _write_shard(
                files.enter_context(written_whole(directory / file)),
                {name: tensors[name] for name in names},
            )
    if len(shards) == 1:
        index_file.unlink(missing_ok=True)  # an older export's index would name its shards
    return directory


def _their_tensors(model, family):
    """{name in the file: tensor}, views of our parameters; a bias that we lack is zeros."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    prefix = "transformer." if family == "gpt2" else "model."
    tensors = {}
    for piece in hf_pieces(model.config):
        name = piece.theirs if piece.theirs.startswith("lm_head") else prefix + piece.theirs
        weight = parameters.get(
            piece.ours.removesuffix("bias") + "weight"
            if piece.ours.endswith("bias")
            else piece.ours
        )
        if weight is None:
            raise UserError(
                "export: this model's weights are packed (int4); export the float model instead"
            )
        tensor = parameters.get(piece.ours, weight.new_zeros(weight.size(0)))
        if piece.rows is not None:
            tensor = tensor[piece.rows[0] : piece.rows[1]]
        tensors[name] = tensor.t() if piece.transposed else tensor
    return tensors


def _bytes(tensor):
    return tensor.numel() * tensor.element_size()


def _shards(tensors):
    """{file: [tensor names]} of at most SHARD_BYTES each, in the model's order."""
    groups, size = [[]], 0
    for name, tensor in tensors.items():
        if groups[-1] and size + _bytes(tensor) > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(tensor)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i + 1:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups)}


def _write_shard(file, tensors):
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_file(whole, file, metadata={"format": "pt"})
    except SafetensorError as error:  # its class for a full disk, too
        raise OSError(str(error)) from error


def _write_json(file, content):
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
