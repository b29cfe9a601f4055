"""GPTConfig: what a model is built from, checked before anything is allocated."""

from dataclasses import dataclass, fields
from typing import ClassVar

from attention_policies import POLICIES
from leangpt.system.errors import UserError

POSITIONS = ("learned", "rope", "none")
NORMS = ("layernorm", "rmsnorm")
MLPS = ("gelu", "gelu_tanh", "swiglu")


@dataclass
class GPTConfig:
    # what a run may change freely: no parameter's shape or meaning depends on it
    FREE: ClassVar[tuple[str, ...]] = (
        "dropout",
        "attention_dropout",
        "attention_policy",
        "q_chunk",
        "k_chunk",
        "checkpoint_layers",
        "offload",
    )

    block_size: int = 1024  # longest context
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # on embeddings, attention weights and both residual branches
    attention_dropout: float | None = None  # on attention weights; None: as dropout
    bias: bool = False  # in linear and norm layers
    n_kv_head: int | None = None  # key/value heads (GQA); None: n_head, or n_head/4 for `grouped`
    attention_policy: str = "cache"  # cache | grouped | recompute
    q_chunk: int | None = None  # rows a tile; None: the plain block (recompute: chosen)
    k_chunk: int | None = None  # key/value rows a tile; None: chosen
    position: str = "learned"  # learned | rope | none
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    mlp: str = "gelu"  # gelu | gelu_tanh | swiglu
    n_inner: int | None = None  # width inside the MLP; None: 4 n_embd
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # as in a Hugging Face config.json
    tie_embeddings: bool = True  # lm_head shares wte
    checkpoint_layers: bool = False  # training saves each layer's input only
    offload: bool = False  # ... and keeps those inputs in pinned host memory (CUDA)

    def __post_init__(self):
        if self.n_kv_head is None and self.attention_policy == "grouped":
            self.n_kv_head = max(1, self.n_head // 4)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("n_kv_head", "q_chunk", "k_chunk", "n_inner"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        for name, known in (
            ("attention_policy", POLICIES),
            ("position", POSITIONS),
            ("norm", NORMS),
            ("mlp", MLPS),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"unknown {name} {getattr(self, name)!r}; choose one of: {', '.join(known)}"
                )
        if self.n_embd % self.n_head:
            raise UserError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        if self.n_head % self.kv_heads:
            raise UserError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if self.attention_policy == "grouped" and self.kv_heads == self.n_head > 1:
            raise UserError(
                "attention_policy='grouped' needs n_kv_head smaller than n_head="
                f"{self.n_head}; use 'cache' for one key/value head per head"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"position='rope' needs an even head size, not {self.head_dim}")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise UserError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.k_chunk is not None and self.attention_policy != "recompute" and not self.q_chunk:
            raise UserError(
                f"k_chunk={self.k_chunk} does nothing under attention_policy="
                f"{self.attention_policy!r} without q_chunk; set q_chunk too"
            )
        if self.offload and not self.checkpoint_layers:
            raise UserError(
                "offload=True moves checkpointed layers to the host: "
                "set checkpoint_layers=True as well"
            )

    @classmethod
    def from_dict(cls, model_args):
        """GPTConfig from a checkpoint's `model_args` (nanoGPT's or ours). Raises UserError."""
        unknown = sorted(set(model_args) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(f"the checkpoint's model_args have keys this model lacks: {unknown}")
        return cls(**model_args)

    @property
    def kv_heads(self):
        """G, the number of key/value heads."""
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self):
        """D, the width of one head."""
        return self.n_embd // self.n_head

    @property
    def inner(self):
        """Width inside the MLP."""
        return self.n_inner or 4 * self.n_embd
