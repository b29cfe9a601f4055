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


def shaped(config_class, settings, where, overrides):
    """(config with a file's settings and the user's overrides, block_size wanted in the end).

    settings: GPTConfig's arguments, as pretrained_shape has them; where: they come from, for
    messages. A table of learned positions is as long as the file's, to be cropped. Raises
    UserError.
    """
    settings, overrides = dict(settings), dict(overrides)
    for key in overrides:
        if key not in (*config_class.FREE, "block_size"):
            known = ", ".join((*config_class.FREE, "block_size"))
            raise UserError(f"{key} is fixed by the pretrained weights; what can be set: {known}")
    block_size = overrides.pop("block_size", None) or settings["block_size"]
    if settings["position"] != "learned":
        settings["block_size"] = block_size
    elif not 0 < block_size <= settings["block_size"]:
        raise UserError(
            f"block_size={block_size}: {where} has learned positions for 1 to "
            f"{settings['block_size']} tokens"
        )
    return config_class(**{**settings, **overrides}), block_size
