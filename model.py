"""GPT: the model every script here trains, samples from and measures.

GPT-2's architecture by default; with norm="rmsnorm", mlp="swiglu", position="rope" it is Llama's,
with qkv_bias=True besides Qwen2's, with qk_norm=True Qwen3's. Parameter names are nanoGPT's, so its
checkpoints load as they are. Where keys and values live while a block runs is the attention
policy's business (attention_policies.py); every policy has the same parameters, so weights trained
under one run under another.

Shapes: B batch, T tokens, C n_embd, H n_head, G key/value heads, D head dim, L layers, V vocab.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
from torch.nn import functional as F

from attention_policies import (
    POLICIES,
    Policy,
    apply_rules,
    decode_block,
    layer_configs,
    prefill_block,
    run_block,
)
from leangpt.attention.kv_source import attend, row_positions
from leangpt.attention.offload import HostStack
from leangpt.attention.protocol import RowParts
from leangpt.attention.tile_sizes import tile_sizes
from leangpt.decoding.generate import generate
from leangpt.layers import mlp_triton
from leangpt.layers.linear_rows import linear_heads, linear_rows
from leangpt.layers.loss import chunked_cross_entropy
from leangpt.layers.rope import apply_rope, rope_table
from leangpt.system.errors import UserError
from leangpt.system.reading import check_fields
from leangpt.weights.load import load_pretrained

POSITIONS = ("learned", "rope", "none")
NORMS = ("layernorm", "rmsnorm")
MLPS = ("gelu", "gelu_tanh", "swiglu")


@dataclass
class GPTConfig:
    """A GPT's shape, and how its blocks run."""

    # what a run may change freely: no parameter's shape or meaning depends on it
    FREE: ClassVar[tuple[str, ...]] = (
        "dropout",
        "attention_dropout",
        "attention_policy",
        "q_chunk",
        "k_chunk",
        "checkpoint_layers",
        "checkpoint_first",
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
    qkv_bias: bool = False  # in the projection to queries, keys and values, whatever `bias` says
    qk_norm: bool = False  # a norm of each head's query and key, before rope (arXiv 2302.05442)
    n_head_dim: int | None = None  # width of a head; None: n_embd / n_head
    n_kv_head: int | None = None  # key/value heads (GQA); None: n_head, or n_head/4 for `grouped`
    attention_policy: str = "cache"  # cache | grouped | recompute
    q_chunk: int | None = None  # rows per tile; None: the plain block (recompute: chosen)
    k_chunk: int | None = None  # key/value rows per tile; None: chosen
    position: str = "learned"  # learned | rope | none
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    mlp: str = "gelu"  # gelu | gelu_tanh | swiglu
    n_inner: int | None = None  # width inside the MLP; None: 4 n_embd
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # as in a Hugging Face config.json
    sliding_window: int | None = None  # tokens that attention sees: no text may be longer
    tie_embeddings: bool = True  # lm_head shares wte
    checkpoint_layers: bool = False  # training saves each layer's input only
    checkpoint_first: int | None = None  # ... of so many layers, the first ones; None: of all
    offload: bool = False  # ... and keeps those inputs in pinned host memory (CUDA)

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("n_kv_head", "n_head_dim", "q_chunk", "k_chunk", "n_inner", "sliding_window"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        choices = dict(attention_policy=POLICIES, position=POSITIONS, norm=NORMS, mlp=MLPS)
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"unknown {name} {value!r}; choose one of: {', '.join(known)}")
        if not self.n_head_dim and self.n_embd % self.n_head:
            raise UserError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        apply_rules(self)
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"position='rope' needs an even head size, not {self.head_dim}")
        if self.sliding_window and self.block_size > self.sliding_window:
            raise UserError(
                f"attention beyond a sliding window of {self.sliding_window} tokens is not "
                f"supported: block_size={self.block_size} must not be longer"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise UserError(f"{name} must lie in [0, 1), not {getattr(self, name)}")

    @classmethod
    def from_dict(cls, model_args):
        """GPTConfig from a checkpoint's `model_args` (nanoGPT's or ours). Raises UserError."""
        check_fields(model_args, cls, "the checkpoint's model_args")
        return cls(**model_args)

    @property
    def policy(self) -> Policy:
        """What attention_policy names."""
        return POLICIES[self.attention_policy]

    @property
    def source(self):
        """Where keys and values come from while a block runs by tiles."""
        return self.policy.source

    @property
    def kv_heads(self):
        """G, the number of key/value heads."""
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self):
        """D, the width of one head."""
        return self.n_head_dim or self.n_embd // self.n_head

    @property
    def inner(self):
        """Width inside the MLP."""
        return self.n_inner or 4 * self.n_embd


class Norm(nn.Module):
    """LayerNorm with an optional bias, or RMSNorm (arXiv 1910.07467), over C numbers or `width`."""

    def __init__(self, config, width=None):
        super().__init__()
        self.kind, self.eps, width = config.norm, config.norm_eps, width or config.n_embd
        self.weight = nn.Parameter(torch.ones(width))
        has_bias = config.bias and config.norm == "layernorm"
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None

    def forward(self, x):  # (..., C) -> (..., C)
        if self.kind == "rmsnorm":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class CausalSelfAttention(nn.Module):
    """Projections of one attention layer; attention_policies.py says where K and V live."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, D = config.n_embd, config.head_dim
        # rows of c_attn: q, k, v; optim/roles.py reads it too
        self.row_blocks = (config.n_head * D, config.kv_heads * D, config.kv_heads * D)
        self.c_attn = nn.Linear(C, sum(self.row_blocks), bias=config.bias or config.qkv_bias)
        self.q_norm = Norm(config, D) if config.qk_norm else None
        self.k_norm = Norm(config, D) if config.qk_norm else None
        self.c_proj = nn.Linear(config.n_head * D, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def project(self, x, positions, parts="qkv", heads=None):
        """Queries, keys and values of some rows, or those that `parts` ("qkv", "q", "kv") names.

        x: (B, t, C), already normed; positions: (t,) or (B, t) int64, for rope, or what rotation()
        made of them; heads: a range (first, stop) of key/value heads, for those and their queries
        alone. Returns a tuple: q (B, H, t, D), k and v (B, G, t, D), rope applied.
        """
        first = "qkv".index(parts)
        start, sizes = sum(self.row_blocks[:first]), self.row_blocks[first : first + len(parts)]
        if heads:
            G = self.config.kv_heads
            y = linear_heads(self.c_attn, x, start, sizes, G, heads)
            sizes = [size // G * (heads[1] - heads[0]) for size in sizes]
        else:
            y = linear_rows(self.c_attn, x, start, start + sum(sizes))
        q_or_k = {"q": self.q_norm, "k": self.k_norm}
        table = self.rotation(positions)
        found = zip(parts, map(self._heads, y.split(sizes, dim=-1)))
        return tuple(self._turn(y, table, q_or_k[p]) if p != "v" else y for p, y in found)

    def _heads(self, x):  # (B, t, n D) -> (B, n, t, D)
        B, t, width = x.shape
        return x.view(B, t, width // self.config.head_dim, self.config.head_dim).transpose(1, 2)

    def rotation(self, positions):
        """Rope's (cos, sin) for positions (t,) or (B, t): all layers' alike. None without rope."""
        config = self.config
        if config.position != "rope" or isinstance(positions, tuple):
            return positions if isinstance(positions, tuple) else None
        theta, scaling = config.rope_theta, config.rope_scaling
        table = rope_table(config.head_dim, positions.flatten(), theta, scaling)
        if positions.ndim == 2:  # each row of the batch at positions of its own
            table = (part.view(len(positions), 1, -1, part.size(-1)) for part in table)
        return tuple(table)

    def _turn(self, x, table, norm):  # (B, n, t, D) -> the same, normed and rope applied
        x = x if norm is None else norm(x).to(x.dtype)
        return x if table is None else apply_rope(x, *table)

    def output(self, y):
        """Heads joined and projected: y (B, H, t, D) -> (B, t, C)."""
        y = y.transpose(1, 2).flatten(2)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """GELU (exact or by tanh) or SwiGLU (arXiv 2002.05202) between two linear layers."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        wide = 2 if config.mlp == "swiglu" else 1  # rows: gate, up
        self.c_fc = nn.Linear(config.n_embd, wide * config.inner, bias=config.bias)
        if config.mlp == "swiglu":  # two matrices, for optimizers that care (optim/roles.py)
            self.c_fc.row_blocks = (config.inner, config.inner)
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, t, C) -> (B, t, C)
        fused = mlp_triton.fused_mlp(x, self.c_fc, self.c_proj, self.kind)
        if fused is not None:
            return self.dropout(fused)
        x = self.c_fc(x)
        if self.kind == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """norm, attention, residual, norm, MLP, residual.

    attention_policies.py runs it, plain or row tile by row tile; what that asks of a block is in
    leangpt/attention/protocol.py.
    """

    compiled = None  # RowParts, once GPT.compile_rows has made them
    pieces = None  # parallel/pieces.Pieces, where other processes hold the other rows

    def __init__(self, config, offload=None):
        """offload: the HostStack that all the model's blocks share, where config.offload."""
        super().__init__()
        self.config = config
        self.offload = offload or (HostStack() if config.offload else None)
        self.ln_1 = Norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x, inplace=False):
        """x (B, T, C) -> (B, T, C); inplace: see attention_policies.run_block."""
        return run_block(self, x, inplace)

    def project(self, x, positions, parts="qkv", heads=None):
        """What precedes attention, rows independent: x (B, t, C) -> as CausalSelfAttention's."""
        return self.attn.project(self.ln_1(x), positions, parts, heads)

    def finish(self, x, y):
        """What follows attention, rows independent: x (B, t, C), y (B, H, t, D) -> (B, t, C)."""
        x = x + self.attn.output(y)
        del y
        return x + self.mlp(self.ln_2(x))

    def plain(self, x):
        """The block untiled: K and V of all rows at once, whatever the policy."""
        positions = row_positions(0, x.size(1), x.device)
        # q, k and v end with this line: they are not held while the MLP runs
        return self.finish(x, attend(*self.project(x, positions), self.attention_dropout))

    @property
    def attention_dropout(self):
        """Probability in force now: none outside training."""
        rate = self.config.attention_dropout
        rate = self.config.dropout if rate is None else rate
        return rate if self.training else 0.0

    @property
    def residual_dropout(self):
        """Likewise."""
        return self.config.dropout if self.training else 0.0


class GPT(nn.Module):
    """Embeddings, blocks, a norm and a head: from tokens to logits, or to their loss."""

    pieces = None  # parallel/pieces.Pieces, where several processes share a sequence
    config_class = GPTConfig  # for those who are handed GPT: readers of files build it themselves

    def __init__(self, config):
        super().__init__()
        self.config = config
        modules = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            modules["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        modules["drop"] = nn.Dropout(config.dropout)
        offload = HostStack() if config.offload else None
        modules["h"] = nn.ModuleList(Block(layer, offload) for layer in layer_configs(config))
        modules["ln_f"] = Norm(config)
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():  # GPT-2: residual branches start smaller
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_params(self, non_embedding=True):
        """Parameter count; position embeddings left out by default, as nanoGPT reports it."""
        count = sum(parameter.numel() for parameter in self.parameters())
        if non_embedding and self.config.position == "learned":
            count -= self.transformer.wpe.weight.numel()
        return count

    def embed(self, idx, positions=None):
        """Tokens idx (B, T) -> the residual stream (B, T, C).

        positions: (T,) or (B, T) int64, by default 0 to T - 1. Raises UserError past block_size.
        """
        T = idx.size(1)
        limited = self.config.position == "learned" or self.config.sliding_window
        if limited and T > self.config.block_size:
            raise UserError(f"{T} tokens do not fit block_size={self.config.block_size}")
        weight = self.transformer.wte.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(idx.device.type):  # a bf16 stream: half the bytes a layer
            dtype = torch.get_autocast_dtype(idx.device.type)
        x = F.embedding(idx, weight.to(dtype))
        if self.config.position == "learned":
            table = self.transformer.wpe.weight.to(dtype)
            x += table[:T] if positions is None else F.embedding(positions, table)
        return self.transformer.drop(x)

    def hidden(self, idx, positions=None):
        """idx (B, T) int64 -> the residual stream after the last block, not normed, (B, T, C)."""
        x = self.embed(idx, positions)
        for block in self.transformer.h:
            x = block(x, inplace=not torch.is_grad_enabled())
        return x

    def forward(self, idx, targets=None):
        """idx (B, T) int64, targets (B, T) int64 with -100 for "ignore", or None.

        Without targets: (logits (B, T, V), None). With them: (None, mean loss), float32; the
        (B T, V) logits never exist at once (layers/loss.py). Raises UserError past block_size.
        """
        positions = count = None
        if self.pieces is not None:  # the mean of the processes' losses is meant
            idx, targets, positions, count = self.pieces.share(idx, targets)
        x = self.hidden(idx, positions)
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x)), None
        packed = not isinstance(self.lm_head, nn.Linear)  # int4: evaluated, never trained
        head = self.lm_head.dequantize(x.dtype) if packed else self.lm_head.weight
        loss = chunked_cross_entropy(x, head, targets, self.transformer.ln_f, count=count)
        return None, loss

    def compiled(self, T, device_type):
        """This model compiled for training on T tokens: whole, or, where its blocks are tiled,
        what they do row by row; the loops over tiles stay plain Python."""
        if tile_sizes(self.config, T, device_type, training=True) is None:
            return torch.compile(self)
        self.compile_rows()
        return self

    def compile_rows(self, backend="inductor"):
        """Compile the parts of the blocks that tiles call, one graph for all layers."""
        # project alone is asked for "qkv", "q", "kv", some heads, ragged tiles, with gradients and
        # without: a graph each, and past the limit torch would quietly compile no more
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for block in self.transformer.h:
            parts = (block.project, block.finish, block.plain)
            block.compiled = RowParts(*(torch.compile(part, backend=backend) for part in parts))

    def last_logits(self, idx):
        """idx (B, T) -> logits (B, V) of the last position, the T others' never computed."""
        return self.lm_head(self.transformer.ln_f(self.hidden(idx)[:, -1]))

    def prefill(self, idx, cache, lengths=None):
        """Read prompts idx (B, T) into an empty cache -> logits (B, V) after each.

        lengths: (B,) int64 where prompts padded on the right are shorter than T. The prompt runs
        as in training: tiled, in place, one residual stream in all. No gradients.
        """
        T = idx.size(1)
        step = cache.check(self.config, len(idx)).begin(T)
        x = self.embed(idx, step.positions)
        for block, layer in zip(self.transformer.h, cache.layers):
            x = prefill_block(block, x, step, layer)
        cache.advance(T)
        if lengths is None:
            last = x[:, -1]
        else:
            cache.set_lengths(lengths)
            last = x[torch.arange(len(x), device=x.device), lengths.to(x.device) - 1]
        return self.lm_head(self.transformer.ln_f(last))

    def decode_one_token(self, idx, cache):
        """One more token a row, or t of equal rows, idx (B, t), into the cache -> logits (B, V)."""
        step = cache.check(self.config, len(idx)).begin(idx.size(1))
        x = self.embed(idx, step.positions)
        rotation = self.transformer.h[0].attn.rotation(step.positions)  # all layers' alike
        for block, layer in zip(self.transformer.h, cache.layers):
            x = decode_block(block, x, step, rotation, layer)
        cache.advance(idx.size(1))
        return self.lm_head(self.transformer.ln_f(x[:, -1]))

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Sample after idx (B, T) -> (B, T + max_new_tokens); see leangpt/decoding/generate.py."""
        return generate(self, idx, max_new_tokens, temperature, top_k, **options)

    @classmethod
    def from_pretrained(cls, name_or_dir, **overrides):
        """GPT with a published model's weights; see leangpt/weights/load.py."""
        return load_pretrained(cls, name_or_dir, **overrides)

    def crop_block_size(self, block_size):
        """Shorten the context of a model with learned positions (a shorter wpe table)."""
        if not 0 < block_size <= self.config.block_size:
            raise UserError(f"cannot crop block_size {self.config.block_size} to {block_size}")
        self.config.block_size = block_size
        if self.config.position == "learned":
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])
