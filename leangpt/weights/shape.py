"""The shape of a published model, from its config.json or a GGUF file's header alone."""

from leangpt.system.errors import UserError
from leangpt.system.reading import read_json
from leangpt.weights.find import find_pretrained
from leangpt.weights.gguf import GGUFWeights
from leangpt.weights.gguf_parts import whole_models
from leangpt.weights.hf_names import config_from_hf

CONFIG_ONLY = ("config.json",)


def pretrained_shape(name_or_dir) -> dict:
    """GPTConfig's arguments for a folder with config.json, a GGUF file or its folder, or a hub id,
    of which config.json alone is downloaded.

    Raises UserError where there is none, or where a key is missing.
    """
    path = find_pretrained(name_or_dir, CONFIG_ONLY)
    if path.suffix == ".gguf":
        return GGUFWeights(path).settings
    config = path / "config.json"
    if config.exists():
        return config_from_hf(read_json(config), config)
    files = whole_models(path.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{path} holds no config.json and not one GGUF file: not a model's folder")
    return GGUFWeights(files[0]).settings
