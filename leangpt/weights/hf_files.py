"""Weights as Hugging Face keeps them: a folder of config.json and safetensors, whole or cut."""

import re
from pathlib import Path

from leangpt.system.errors import UserError, refused
from leangpt.system.reading import mapping, read_json, regular_file
from leangpt.weights.hf_names import config_from_hf, hf_pieces

INDEX = "model.safetensors.index.json"
# tensors older files hold that are no parameters: causal masks, rotary frequencies
NOT_WEIGHTS = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")


class SafetensorsWeights:
    """Weights of a Hugging Face folder: `settings` (GPTConfig arguments), `pieces`, `read(name)`.

    Read in the order of the files, as `in_file_order` has it, each shard is mapped once.
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
            if not isinstance(index, dict) or not all(type(f) is str for f in index.values()):
                raise UserError(f"{path / INDEX} has no weight_map of tensors and their files")
            files = [path / Path(name).name for name in sorted(set(index.values()))]
        self._where = {}  # name -> (its file, its name there, its shape)
        self._file = self._shard = None  # the one that is open: what is read of it stays mapped
        for file in files:
            shard = self._open(file)
            for stored in shard.keys():
                name = re.sub(r"^(transformer|model)\.", "", stored)
                if not NOT_WEIGHTS.search(name):
                    shape = tuple(shard.get_slice(stored).get_shape())
                    self._where[name] = (file, stored, shape)

    @staticmethod
    def _open(file):
        from safetensors import SafetensorError, safe_open

        if not file.exists():
            raise UserError(f"{file} is missing, though {INDEX} names it")
        try:
            with mapping(file):
                return safe_open(regular_file(file), framework="pt")
        except OSError as error:
            raise refused(f"cannot read {file}", error) from None
        except SafetensorError as error:
            raise UserError(f"{file}: not a safetensors file, or a part of one ({error})") from None

    def names(self):
        """Names of the tensors that belong to the model."""
        return set(self._where)

    def shape(self, name):
        """Shape of a tensor as the file has it, without reading it."""
        return self._where[name][2]

    def read(self, name):
        """The tensor in the file's dtype. Of several shards one is open at a time."""
        file, stored, _ = self._where[name]
        if file != self._file:
            self._shard = None  # before the next one is mapped
            self._file, self._shard = file, self._open(file)
        with mapping(file):
            tensor = self._shard.get_tensor(stored)
        if not tensor.is_floating_point():
            raise UserError(
                f"{self.path}: tensor {name} is {tensor.dtype}; quantised weights are "
                "read from GGUF files only"
            )
        return tensor

    def pieces(self, config):
        """Which of our parameters each tensor fills (hf_names.Piece)."""
        return hf_pieces(config)

    def in_file_order(self, pieces):
        """The pieces of one shard after another's."""
        return sorted(pieces, key=lambda piece: self._where[piece.theirs][0])
