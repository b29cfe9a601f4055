"""Our GPT as a Hugging Face folder: safetensors and a config.json that `transformers` loads.

GPT-2-shaped models become GPT2LMHeadModel, Llama-shaped ones LlamaForCausalLM (or Mistral's,
Qwen2's, Qwen3's), with the same logits; what none can express is an error that names the setting.
"""

import contextlib
import json
from pathlib import Path

from leangpt.system.errors import UserError
from leangpt.system.whole_files import sync, writing, written_whole
from leangpt.text.text_files import TEXT_FILES
from leangpt.weights.hf_names import config_to_hf, hf_pieces

SHARD_BYTES = 5 * 2**30
CONFIG = "config.json"  # without which a folder is no model
INDEX = "model.safetensors.index.json"
OTHERS = ("ckpt.pt", "ckpt_last.pt", "metrics.csv", "meta.json", "meta.pkl", "train.bin")


def export_pretrained(model, directory, text_files=None):
    """Write `directory`/config.json and model.safetensors (shards and index beyond 5 GiB), and
    `text_files` (text_files.py) of the model's text.

    model: a GPT in any floating dtype, with plain weights (not int4). Returns the directory as a
    Path. An earlier export there is replaced, and no model at all while its files are: whoever is
    killed in between leaves no mixture of both.
    Raises UserError, with nothing written, where transformers has no such architecture, where the
    folder holds a run or a data set, and where it or the disk does not take the model.
    """
    config = config_to_hf(model.config)
    tensors = _their_tensors(model, config["model_type"])
    config["torch_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"export: {directory} is a file, not a folder")
    for name in OTHERS:
        if (directory / name).exists():
            raise UserError(f"export: {directory} is not a model's ({name}); give another folder")
    shards = _shards(tensors)
    with contextlib.ExitStack() as stack:  # all get their names at the end, the last here first
        temporaries = []

        def written(name):
            temporaries.append(stack.enter_context(written_whole(directory / name, fsync=True)))
            return temporaries[-1]

        _write_json(written(CONFIG), config)
        for name, content in (text_files or {}).items():
            written(name).write_bytes(content.encode())
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            total = sum(_bytes(tensor) for tensor in tensors.values())
            _write_json(
                written(INDEX), {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        for file, names in shards.items():
            _write_shard(written(file), {name: tensors[name] for name in names})
        stale = [CONFIG]
        stale += [INDEX] if len(shards) == 1 else []  # which would name an older one's shards
        stale += [] if text_files is None else set(TEXT_FILES) - set(text_files)
        with writing(directory):
            for temporary in temporaries:
                sync(temporary)
            for name in stale:  # from here on there is no model, until all have their names
                (directory / name).unlink(missing_ok=True)
            sync(directory)
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
