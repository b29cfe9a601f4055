"""What a training run is to the planner, and the tensors it keeps: exact to the byte.

A `Run` is a model's configuration and the settings that decide memory; `kept_tensors` lists its
parameters with their optimizer state, from a model of one layer on the meta device, as layers are
alike. Nothing is allocated.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from leangpt.optim.accounting import new_state, planned_groups
from leangpt.optim.build import check_freed
from leangpt.optim.sharded.rows import RowShards

SHAPE = (
    "n_layer n_head n_embd kv_heads head_dim inner vocab_size position norm mlp bias "
    "qkv_bias qk_norm tie_embeddings"
).split()
WHOLE_GRADIENTS = 1 / 8  # of a GPU's memory: so much may gradients take that wait to be reduced
_known = {}  # what decides them -> the tensors that runs keep


@dataclass(frozen=True)
class Run:
    """A training run as far as its memory goes.

    config: a GPTConfig, or what has its fields. The others are called as train.py's settings are;
    micro_batches: of a step, on this process.
    """

    config: object
    batch_size: int = 1
    block_size: int | None = None  # tokens a sequence; None: the config's
    micro_batches: int = 1
    variant: str = "adam"
    options: dict = field(default_factory=dict)  # the variant's, fused_backward among them
    param_bytes: int = 4  # a number of weights and gradients: 4 float32, 2 bfloat16
    stream_bytes: int = 4  # a number of the residual stream: autocast's
    device_type: str = "cpu"
    processes: int = 1
    parallel: str = "ddp"  # of several processes: ddp | fsdp
    context_parallel: int = 1  # of them share each sequence, a piece of its rows each
    device_memory: int | None = None  # bytes of a GPU: by which shares' gradients are reduced
    compiled: bool = False
    threads: int = field(default_factory=torch.get_num_threads)  # of the CPU

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on this process."""
        return self.batch_size * self.rows

    @property
    def rows(self) -> int:
        """Of a sequence, on this process: two pieces of it, where others have the rest."""
        K = self.context_parallel
        return self.length if K == 1 else 2 * -(-self.length // (2 * K))

    @property
    def data_parallel(self) -> int:
        """How many shares a step's batch is divided into."""
        return self.processes // self.context_parallel

    @property
    def shares(self) -> int:
        """Processes that share weights, gradients and state; 1: each holds everything."""
        return self.processes if self.parallel == "fsdp" else 1

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.block_size or self.config.block_size

    @property
    def fused(self) -> bool:
        """Are weights updated inside backward?"""
        return bool(self.options.get("fused_backward"))

    @property
    def gradient_bits(self) -> int:
        """Bits of a number of the sum that gradients go into; 0: they stand as they are."""
        return int(self.options.get("gradient_bits", 0))

    @cached_property
    def tensors(self) -> list["Kept"]:
        """Every parameter, layers' once; the same list for runs that differ elsewhere."""
        c = self.config
        rows = c.block_size if c.position == "learned" else 0  # of the table of positions
        key = tuple(getattr(c, name) for name in SHAPE if hasattr(c, name)) + (
            rows, self.variant, repr(self.options), self.param_bytes, self.shares,
        )  # fmt: skip
        if key not in _known:
            if len(_known) > 10_000:
                _known.clear()
            _known[key] = kept_tensors(self)
        return _known[key]


@dataclass(frozen=True)
class Kept:
    """A parameter and its state; `count` of them are alike, one a layer. Of a sharded one what the
    process with most of its rows has."""

    name: str  # of layer 0's, with count > 1 or in a model of one layer
    shape: tuple[int, ...]
    count: int
    cls: type  # of its optimizer
    group: dict  # with every option
    state: dict[str, tuple[tuple[int, ...], torch.dtype]]
    itemsize: int
    rows: int = 1  # of the whole parameter
    shares: int = 1  # processes that its rows are on

    @property
    def numbers(self) -> int:
        """Of one of them."""
        return math.prod(self.shape)

    @property
    def padded(self) -> int:
        """Numbers of one of them where every process's rows are: gathered, as many from each."""
        return self.shares * self.numbers

    @property
    def whole(self) -> int:
        """Numbers of one of them, on all processes together."""
        return self.numbers // self.shape[0] * self.rows

    @property
    def bytes(self) -> int:
        """Of one of them."""
        return self.numbers * self.itemsize

    @property
    def state_bytes(self) -> int:
        """Of one of them."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.state.values())

    @property
    def in_layer(self) -> bool:
        return ".h." in self.name


def kept_tensors(run: Run) -> list[Kept]:
    """The parameters of a run and the state of its optimizer. Raises UserError as build_optimizer.

    The norm that clipping inside backward keeps (4 bytes) is left out.
    """
    model = one_layer(run.config)
    freeing = ("fused_backward", "gradient_bits", "grad_clip")
    options = {k: v for k, v in run.options.items() if k not in freeing}
    cls, groups = planned_groups(model, run.variant, **options)
    check_freed(cls, *(run.options.get(name) for name in freeing))
    dtype = {4: torch.float32, 2: torch.bfloat16}[run.param_bytes]
    names = {id(p): name for name, p in model.named_parameters()}
    kept = []
    for group in groups:
        for p in group["params"]:
            rows = RowShards.planned(p.shape, run.shares) if run.shares > 1 else None
            here = p.detach()[: rows.rows_of(0)[1]] if rows else p
            state = new_state(cls, here.to(dtype), group, rows)
            name = names[id(p)]
            kept.append(
                Kept(
                    name,
                    tuple(here.shape),
                    run.config.n_layer if ".h." in name else 1,
                    cls,
                    group,
                    {key: (tuple(value.shape), value.dtype) for key, value in state.items()},
                    run.param_bytes,
                    len(p),
                    run.shares,
                )
            )
    return kept


class _Linear(nn.Linear):
    def reset_parameters(self):
        """Nothing to draw: there are no numbers, and drawing none takes its time."""


class _Embedding(nn.Embedding):
    def reset_parameters(self):
        """Likewise."""


def one_layer(config) -> nn.Module:
    """The parameters of a GPT of this configuration but with one block, on the meta device, under
    model.py's names; a module that computes nothing."""
    C, D = config.n_embd, config.head_dim
    q, kv = config.n_head * D, config.kv_heads * D
    wide = 2 if config.mlp == "swiglu" else 1
    vector_bias = config.bias and config.norm == "layernorm"

    def linear(columns, rows, bias=config.bias):
        return _Linear(columns, rows, bias, device="meta")

    def norm(width=C):
        return nn.LayerNorm(width, bias=vector_bias, device="meta")

    qkv = linear(C, q + 2 * kv, config.bias or config.qkv_bias)
    attention = nn.ModuleDict({"c_attn": qkv, "c_proj": linear(q, C)})
    if config.qk_norm:
        attention.update({"q_norm": norm(D), "k_norm": norm(D)})
    attention.row_blocks = (q, kv, kv)  # as model.CausalSelfAttention says it
    mlp = nn.ModuleDict({"c_fc": linear(C, wide * config.inner), "c_proj": linear(config.inner, C)})
    if config.mlp == "swiglu":  # likewise model.MLP
        mlp["c_fc"].row_blocks = (config.inner, config.inner)
    block = nn.ModuleDict({"ln_1": norm(), "attn": attention, "ln_2": norm(), "mlp": mlp})
    parts = {"wte": _Embedding(config.vocab_size, C, device="meta")}
    if config.position == "learned":
        parts["wpe"] = _Embedding(config.block_size, C, device="meta")
    parts |= {"h": nn.ModuleList([block]), "ln_f": norm()}
    model = nn.ModuleDict(
        {"transformer": nn.ModuleDict(parts), "lm_head": linear(C, config.vocab_size, False)}
    )
    if config.tie_embeddings:
        model["lm_head"].weight = parts["wte"].weight
    return model
