"""Finding a published model by name: a folder, a GGUF file, or a hub id that is downloaded."""

import contextlib
import re
from pathlib import Path

from leangpt.system.errors import UserError
from leangpt.text.text_files import SOURCES
from leangpt.weights.gguf import GGUFWeights
from leangpt.weights.gguf_parts import whole_models
from leangpt.weights.hf_files import INDEX, SafetensorsWeights

GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
WEIGHT_FILES = ("model*.safetensors", INDEX)  # what is downloaded of a model, beside its text
ALL_FILES = (*SOURCES, *WEIGHT_FILES)


def find_pretrained(name_or_dir, files=ALL_FILES):
    """The local folder or .gguf file of a model; hub ids are downloaded (and cached) first.

    files: patterns of what is downloaded; SOURCES: the tokenizer's files, without the weights.
    """
    name, path = str(name_or_dir), Path(name_or_dir).expanduser()
    refuse_misnamed_gguf(path)
    if path.suffix in PICKLES:
        raise UserError(
            f"{path}: a foreign pickle could run code; convert it to safetensors"
            f"{own_checkpoint(path.parent, path.name)}"
        )
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.suffix == ".gguf" or path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name}: no such folder or .gguf file, and not the name of a hub model")
    hub_id = f"openai-community/{name}" if name in GPT2_SIZES else name
    return _download(hub_id, files)


def refuse_misnamed_gguf(path):
    """Raise UserError where a file that begins as GGUF does has another name: names are gone by."""
    path, begins = Path(path), b""
    with contextlib.suppress(OSError):  # whoever reads it will say so
        if path.suffix != ".gguf" and path.is_file():
            with open(path, "rb") as file:
                begins = file.read(4)
    if begins == b"GGUF":
        raise UserError(f"{path} is a GGUF file: give it a name that ends in .gguf")


def own_checkpoint(folder, name):
    """What to add to the refusal of a pickle that train.py may have written."""
    return f" (a checkpoint of train.py: --out_dir={folder})" if name.startswith("ckpt") else ""


def _download(hub_id, files):
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise UserError(
            f"{hub_id!r} is no local folder, and downloading needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
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
    files = whole_models(path.glob("*.gguf"))
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
            f"convert them to model.safetensors{own_checkpoint(path, pickles[0])}"
        )
    raise UserError(f"{path} holds no model.safetensors and no {INDEX}")


def _shards_exist(path):
    return (path / "model.safetensors").exists() or (path / INDEX).exists()
