"""Published weights into our GPT: the GPT-2 and Llama families from the Hugging Face hub, a folder
with config.json and safetensors, or a GGUF file.

Weights never run code: foreign pickles (.bin, .pt) are refused. The model is made empty and filled
one tensor at a time from a memory map, so that there is one copy of the weights and one tensor.
"""

import json
import re
from pathlib import Path

import torch

from leangpt.system.errors import UserError
from leangpt.weights.gguf import GGUFWeights
from leangpt.weights.hf_names import config_from_hf, hf_pieces
from model import GPT, GPTConfig

GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
INDEX = "model.safetensors.index.json"
# settings of ours that leave a model's function alone, and so may differ from the file's
OVERRIDABLE = (*GPTConfig.FREE, "block_size")
# tensors older files hold that are no parameters: causal masks, rotary frequencies
NOT_WEIGHTS = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")


def load_pretrained(name_or_dir, device="cpu", dtype=torch.float32, **overrides):
    """A GPT with published weights, in evaluation mode, on `device` with parameters in `dtype`.

    name_or_dir: gpt2 | gpt2-medium | gpt2-large | gpt2-xl, another hub id, a folder with
    config.json and model.safetensors (or its shards and index), or a GGUF file or its folder.
    overrides: dropout, attention_policy, q_chunk, k_chunk, block_size, ... of GPTConfig; with
    learned positions block_size can only shrink.
    Raises UserError where the weights cannot be had, are damaged, do not fit (the tensor and
    both shapes are named), or belong to an architecture that GPT cannot express.
    """
    weights = open_weights(find_pretrained(name_or_dir))
    config, block_size = _config(weights, overrides)
    try:
        with torch.device("meta"):  # shapes alone
            model = GPT(config)
    except RuntimeError as error:
        raise UserError(
            f"{weights.path}: no tensor can be of the announced sizes ({error})"
        ) from None
    places = _places(model, weights)
    model = _allocate(model, device, dtype)
    _fill(model, weights, places)
    if block_size < config.block_size:
        model.crop_block_size(block_size)
    return model.eval()


def find_pretrained(name_or_dir):
    """The local folder or .gguf file of a model; hub ids are downloaded (and cached) first."""
    name, path = str(name_or_dir), Path(name_or_dir).expanduser()
    if path.suffix in PICKLES:
        raise UserError(f"{path}: a foreign pickle could run code; convert it to safetensors")
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.suffix == ".gguf" or path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name}: no such folder or .gguf file, and not the name of a hub model")
    return _download(f"openai-community/{name}" if name in GPT2_SIZES else name)


def _download(hub_id):
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise UserError(
            f"{hub_id!r} is no local folder, and downloading needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    wanted = [
        "config.json",
        "generation_config.json",
        "tokenizer*",
        "chat_template*",
        "model*.safetensors",
        INDEX,
    ]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except HFValidationError as error:
        raise UserError(f"{hub_id!r} is neither a folder nor a hub name ({error})") from None
    except Exception as error:  # the hub client raises its own, httpx's and the OS's errors alike
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{hub_id!r} is no local folder and could not be downloaded ({reason}); "
            "give a local folder with config.json and safetensors"
        ) from None


def open_weights(path):
    """SafetensorsWeights or GGUFWeights for a folder or file; UserError where there is neither."""
    path = Path(path)
    if path.suffix == ".gguf":
        return GGUFWeights(path)
    if (path / "config.json").exists() and _shards_exist(path):
        return SafetensorsWeights(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return GGUFWeights(files[0])
    if files:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{path} holds several GGUF files ({names}); name one of them")
    if not (path / "config.json").exists():
        raise UserError(f"{path} holds no config.json and no GGUF file: not a model's folder")
    pickles = [file.name for file in path.iterdir() if file.suffix in PICKLES]
    if pickles:
        raise UserError(
            f"{path} holds only pickled weights ({pickles[0]}), which could run code; "
            "convert them to model.safetensors"
        )
    raise UserError(f"{path} holds no model.safetensors and no {INDEX}")


def _shards_exist(path):
    return (path / "model.safetensors").exists() or (path / INDEX).exists()


def read_json(path):
    """A JSON object from a file; UserError where it is not one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


class SafetensorsWeights:
    """Weights of a Hugging Face folder: `settings` (GPTConfig arguments), `pieces`, `read(name)`.

    Names come without the "transformer." or "model." that some files put in front.
    """

    def __init__(self, path):
        self.path = path
        self.settings = config_from_hf(read_json(path / "config.json"), path / "config.json")
        single = path / "model.safetensors"
        if single.exists():
            files = [single]
        else:
            index = read_json(path / INDEX).get("weight_map")
            if not isinstance(index, dict):
                raise UserError(f"{path / INDEX} has no weight_map")
            files = [path / Path(name).name for name in sorted(set(index.values()))]
        self._where = {}  # name -> (its shard, its name there)
        for file in files:
            shard = self._open(file)
            for stored in shard.keys():
                name = re.sub(r"^(transformer|model)\.", "", stored)
                if not NOT_WEIGHTS.search(name):
                    self._where[name] = (shard, stored)

    @staticmethod
    def _open(file):
        from safetensors import SafetensorError, safe_open

        if not file.exists():
            raise UserError(f"{file} is missing, though {INDEX} names it")
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a safetensors file, or a part of one ({error})") from None

    def names(self):
        """Names of the tensors that belong to the model."""
        return set(self._where)

    def shape(self, name):
        """Shape of a tensor as the file has it, without reading it."""
        shard, stored = self._where[name]
        return tuple(shard.get_slice(stored).get_shape())

    def read(self, name):
        """The tensor in the file's dtype."""
        shard, stored = self._where[name]
        tensor = shard.get_tensor(stored)
        if not tensor.is_floating_point():
            raise UserError(
                f"{self.path}: tensor {name} is {tensor.dtype}; quantised weights are "
                "read from GGUF files only"
            )
        return tensor

    def pieces(self, config):
        """Which of our parameters each tensor fills (hf_weights.Piece)."""
        return hf_pieces(config)


def _config(weights, overrides):
    """(GPTConfig with the file's shapes and the user's overrides, block_size wanted in the end)."""
    settings = dict(weights.settings)
    for key in overrides:
        if key not in OVERRIDABLE:
            known = ", ".join(OVERRIDABLE)
            raise UserError(f"{key} is fixed by the pretrained weights; what can be set: {known}")
    block_size = overrides.pop("block_size", None) or settings["block_size"]
    if settings["position"] != "learned":
        settings["block_size"] = block_size
    elif not 0 < block_size <= settings["block_size"]:
        raise UserError(
            f"block_size={block_size}: {weights.path} has learned positions for 1 to "
            f"{settings['block_size']} tokens"
        )
    config = GPTConfig(**{**settings, **overrides})
    count = len(weights.names())
    if config.n_layer > count:
        raise UserError(
            f"{weights.path}: {config.n_layer} layers are announced, and the file "
            f"has {count} tensors in all"
        )
    return config, block_size


def _allocate(model, device, dtype):
    """A GPT on the meta device -> the same with parameters allocated and not yet filled."""
    if model.config.tie_embeddings:  # to_empty would give the two names a tensor each
        model.lm_head.weight = None
    model = model.to(dtype).to_empty(device=device)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def _places(model, weights):
    """The pieces that fill the model; UserError for missing, left over or misshapen tensors.

    Before a byte is allocated: a damaged config.json may ask for any size.
    """
    pieces, found = weights.pieces(model.config), weights.names()
    wanted = {piece.theirs for piece in pieces}
    if model.config.tie_embeddings and "lm_head.weight" in found:
        _check_tied(weights, pieces[0].theirs)
        found = found - {"lm_head.weight"}
    _name_some(sorted(wanted - found), f"{weights.path}: tensor %s is missing")
    _name_some(sorted(found - wanted), f"{weights.path}: tensor %s is not part of such a model")
    parameters = dict(model.named_parameters())
    for piece in pieces:
        shape, needed = weights.shape(piece.theirs), _place(parameters, piece).shape
        if shape != needed:
            raise UserError(
                f"{weights.path}: tensor {piece.theirs} has shape {list(shape)}, the "
                f"model needs {list(needed)}"
            )
    return pieces


def _place(parameters, piece):
    """The part of our parameters, in their orientation, that a piece fills."""
    place = parameters[piece.ours]
    if piece.rows is not None:
        place = place[piece.rows[0] : piece.rows[1]]
    return place.t() if piece.transposed else place


@torch.no_grad()
def _fill(model, weights, pieces):
    """Copy every tensor to its place, one at a time."""
    parameters, filled = dict(model.named_parameters()), 0
    for piece in pieces:
        tensor = weights.read(piece.theirs)
        if piece.paired_heads:
            tensor = halves_apart(tensor, piece.paired_heads)
        place = _place(parameters, piece)
        place.copy_(tensor)
        filled += place.numel()
    assert filled == sum(parameter.numel() for parameter in parameters.values())


def halves_apart(weight, n_head):
    """Rows (n_head D, C) with rotary pairs (2i, 2i+1) reordered to pairs (i, i + D/2)."""
    rows, C = weight.shape
    return weight.view(n_head, rows // n_head // 2, 2, C).transpose(1, 2).reshape(rows, C)


def _check_tied(weights, embedding):
    if not torch.equal(weights.read("lm_head.weight"), weights.read(embedding)):
        raise UserError(
            f"{weights.path}: the config ties lm_head.weight to {embedding}, but the "
            "file holds different numbers for them; set tie_word_embeddings to false"
        )


def _name_some(names, message):
    if names:
        others = f" ({len(names) - 1} more like it)" if len(names) > 1 else ""
        raise UserError(message % names[0] + others)
