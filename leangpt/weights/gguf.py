"""GGUF files (llama.cpp's format) for reading: settings and dequantised tensors.

Parsed and dequantised by the `gguf` package, one tensor at a time from a memory map. Two things
differ from Hugging Face's files: the names, and the row order of Llama's q and k, whose rotary
pairs lie side by side here and D/2 rows apart there (and in our model).
"""

from pathlib import Path

import numpy as np
import torch

from leangpt.system.errors import UserError
from leangpt.system.reading import parsing
from leangpt.weights.gguf_header import check_header
from leangpt.weights.gguf_parts import check_parts, part_paths
from leangpt.weights.hf_names import SUPPORTED, gpt2_pieces, llama_pieces, need

LLAMA_NAMES = {
    "wte": "token_embd",
    "ln_f": "output_norm",
    "ln_1": "blk.{i}.attn_norm",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "attn.q_norm": "blk.{i}.attn_q_norm",
    "attn.k_norm": "blk.{i}.attn_k_norm",
    "attn.c_proj": "blk.{i}.attn_output",
    "ln_2": "blk.{i}.ffn_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "mlp.c_proj": "blk.{i}.ffn_down",
    "head": "output",
}
GPT2_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "blk.{i}.attn_norm",
    "attn.c_attn": "blk.{i}.attn_qkv",
    "attn.c_proj": "blk.{i}.attn_output",
    "ln_2": "blk.{i}.ffn_norm",
    "mlp.c_fc": "blk.{i}.ffn_up",
    "mlp.c_proj": "blk.{i}.ffn_down",
    "head": "output",
}
# Llama's family: what sets a member apart in GPTConfig. (Mistral's files say llama.)
LLAMA_LIKE = {"llama": {}, "qwen2": dict(qkv_bias=True), "qwen3": dict(qk_norm=True)}
ROPE_FACTORS = "rope_freqs.weight"  # (D/2,): what Llama 3 files divide their frequencies by


class GGUFWeights:
    """The weights of a .gguf file: `settings` (GPTConfig arguments), `pieces`, `read(name)`.

    Of a model in several parts (gguf_parts.py) any part stands for all of them. `metadata` is the
    first one's. Raises UserError for a damaged file, a part that is missing, another architecture,
    or the `gguf` package missing.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            import gguf
        except ImportError:
            raise UserError("reading GGUF files needs the gguf package: pip install gguf") from None
        self._dequantize = gguf.quants.dequantize
        parts, said, self._tensors = part_paths(self.path), [], {}
        for part in parts:
            check_header(part)
            try:
                reader = gguf.GGUFReader(part)
                said.append({name: field.contents() for name, field in reader.fields.items()})
            except Exception as error:  # what its parser stumbles over is no list that ends
                raise UserError(f"{part}: not a GGUF file, or a part of one ({error})") from None
            self._tensors |= {tensor.name: tensor for tensor in reader.tensors}
        check_parts(parts, said)
        self.metadata = said[0]
        with parsing(self.path):
            self.settings = self._settings()

    def names(self):
        """Names of the tensors that belong to the model."""
        return set(self._tensors) - {ROPE_FACTORS}

    def shape(self, name):
        """Shape as PyTorch has it, (out, in) for a linear weight."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def read(self, name):
        """The tensor, dequantised to float32."""
        tensor = self._tensors[name]
        try:
            numbers = self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(
                f"{self.path}: tensor {name} is {kind}, which gguf cannot dequantise"
            ) from None
        numbers = np.require(numbers, np.float32, ["C", "W", "E"])  # a copy only of a mapped one
        return torch.from_numpy(numbers).view(self.shape(name))

    def kind(self, name):
        """How its numbers are stored: "F16", "Q4_1", ..."""
        return self._tensors[name].tensor_type.name

    def stored(self, name):
        """Its bytes as they are in the file, (rows, bytes of a row) uint8, mapped."""
        return self._tensors[name].data

    def pieces(self, config):
        """Which of our parameters each tensor fills (hf_names.Piece)."""
        if self._family() == "gpt2":
            return list(gpt2_pieces(config, GPT2_NAMES, conv1d=False))
        return list(llama_pieces(config, LLAMA_NAMES, paired=self._family() == "llama"))

    def _family(self):
        return self.metadata.get("general.architecture")

    def _settings(self):
        family = self._family()
        if family != "gpt2" and (not isinstance(family, str) or family not in LLAMA_LIKE):
            raise UserError(f"{self.path}: architecture {family!r} is not supported; {SUPPORTED}")
        keys = {name.removeprefix(family + "."): value for name, value in self.metadata.items()}
        if "token_embd.weight" not in self._tensors:
            raise UserError(f"{self.path}: tensor token_embd.weight is missing")
        n_head = need(keys, "attention.head_count", self.path)
        settings = dict(
            block_size=need(keys, "context_length", self.path),
            vocab_size=self.shape("token_embd.weight")[0],
            n_layer=need(keys, "block_count", self.path),
            n_head=n_head,
            n_kv_head=need(
                {"attention.head_count_kv": n_head, **keys}, "attention.head_count_kv", self.path
            ),
            n_embd=need(keys, "embedding_length", self.path),
            n_inner=need(keys, "feed_forward_length", self.path),
            tie_embeddings="output.weight" not in self._tensors,
        )
        if family == "gpt2":
            epsilon = round_float32(keys.get("attention.layer_norm_epsilon", 1e-5))
            return settings | dict(
                bias=True, position="learned", norm="layernorm", norm_eps=epsilon, mlp="gelu_tanh"
            )
        settings |= LLAMA_LIKE[family]
        if "attention.sliding_window" in keys:  # beyond it, attention is nothing we have
            window = need(keys, "attention.sliding_window", self.path)
            context = min(settings["block_size"], window)
            settings |= dict(sliding_window=window, block_size=context)
        return settings | dict(
            n_head_dim=self._head_dim(keys, settings),
            bias=False,
            position="rope",
            rope_theta=round_float32(keys.get("rope.freq_base", 10000.0)),
            rope_scaling=self._rope_scaling(keys),
            norm="rmsnorm",
            norm_eps=round_float32(keys.get("attention.layer_norm_rms_epsilon", 1e-5)),
            mlp="swiglu",
        )

    def _head_dim(self, keys, settings):
        """The head size, or None where it is width / heads. UserError for two different ones."""
        if keys.get("expert_count"):
            raise UserError(f"{self.path}: mixtures of experts are not supported")
        usual = settings["n_embd"] / settings["n_head"]
        head_dim = keys.get("attention.key_length", usual)
        for key in ("rope.dimension_count", "attention.value_length"):
            if keys.get(key, head_dim) != head_dim:
                raise UserError(
                    f"{self.path}: {key}={keys[key]} differs from the head size {head_dim:g}, "
                    "which is not supported"
                )
        if head_dim == usual:
            return None
        return need(keys, "attention.key_length", self.path)

    def _rope_scaling(self, keys):
        """As llama.cpp: a factor counts unless the type is "none"; an older key has one too."""
        kind = keys.get("rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise UserError(
                f"{self.path}: rope scaling {kind!r} is not supported, only linear, llama3"
            )
        factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
        factor = 1.0 if kind == "none" or not factor else round_float32(factor)
        if ROPE_FACTORS in self._tensors:
            factors = (self.read(ROPE_FACTORS) * factor).tolist()
            return {"rope_type": "factors", "factors": factors}
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def round_float32(value):
    """The shortest decimal that is the same float32: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{value:.7g}")
