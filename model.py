"""GPT: the model every script here trains, samples from and measures.

GPT-2's architecture by default; with norm="rmsnorm", mlp="swiglu", position="rope" it is Llama's.
Parameter names are nanoGPT's, so its checkpoints load as they are. Where keys and values live
while a block runs is the attention policy's business (attention_policies.py,
leangpt/attention/block_tiles.py); every policy has the same parameters, so weights trained under
one run under another.

Shapes: B batch, T tokens, C n_embd, H n_head, G key/value heads, D head dim, L layers, V vocab.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from attention_policies import attend
from gpt_config import GPTConfig
from leangpt.attention.block_tiles import fill_cache, run_block, tile_sizes
from leangpt.layers import mlp_triton
from leangpt.layers.loss import chunked_cross_entropy
from leangpt.layers.rope import apply_rope, rope_table
from leangpt.system.errors import UserError

__all__ = ["GPT", "Block", "GPTConfig"]


class Norm(nn.Module):
    """LayerNorm with an optional bias, or RMSNorm (arXiv 1910.07467)."""

    def __init__(self, config):
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        has_bias = config.bias and config.norm == "layernorm"
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if has_bias else None

    def forward(self, x):  # (..., C) -> (..., C)
        if self.kind == "rmsnorm":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class CausalSelfAttention(nn.Module):
    """Projections of one attention layer; attention_policies.py says where K and V live."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, kv_width = config.n_embd, config.kv_heads * config.head_dim
        self.c_attn = nn.Linear(C, C + 2 * kv_width, bias=config.bias)  # rows: q, k, v
        self.c_attn.row_blocks = (C, kv_width, kv_width)  # optimizers may treat them apart
        self.c_attn.head_dim = config.head_dim
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def project_qkv(self, x, positions, heads=None):
        """Queries, keys and values of some rows.

        x: (B, t, C), already normed; positions: (t,) or (B, t) int64, for rope, or what rotation()
        made of them; heads: a range (first, stop) of key/value heads, for those and their queries
        alone.
        Returns q (B, H, t, D), k (B, G, t, D), v (B, G, t, D), rope applied.
        """
        if heads:
            q, k, v = self._some_heads(x, heads, 0, 3)
        else:
            q, k, v = self.c_attn(x).split(self.c_attn.row_blocks, dim=-1)
        q, k, v = (self._heads(part) for part in (q, k, v))
        table = self.rotation(positions)
        return self._rotate(q, table), self._rotate(k, table), v

    def project_q(self, x, positions, heads=None):
        """Queries alone: x (B, t, C) -> (B, H, t, D)."""
        q = self._some_heads(x, heads, 0, 1)[0] if heads else self._rows(x, 0, self.config.n_embd)
        return self._rotate(self._heads(q), self.rotation(positions))

    def project_kv(self, x, positions, heads=None):
        """Keys and values alone: x (B, t, C) -> two of (B, G, t, D)."""
        C, kv_width, _ = self.c_attn.row_blocks
        if heads:
            k, v = self._some_heads(x, heads, 1, 3)
        else:
            k, v = self._rows(x, C, C + 2 * kv_width).split(kv_width, dim=-1)
        return self._rotate(self._heads(k), self.rotation(positions)), self._heads(v)

    def _some_heads(self, x, heads, first, stop):
        """Row blocks [first, stop) of c_attn (q, k, v), of each the rows of some key/value heads.

        One product of gathered weights: its backward makes one gradient of x, not one a block.
        """
        blocks = self.c_attn.row_blocks
        sizes = [block // self.config.kv_heads for block in blocks]  # rows a key/value head
        rows = torch.cat(
            [
                sum(blocks[:n]) + torch.arange(heads[0] * sizes[n], heads[1] * sizes[n])
                for n in range(first, stop)
            ]
        ).to(x.device)
        weight, bias = self.c_attn.weight.index_select(0, rows), self.c_attn.bias
        x = F.linear(x, weight, None if bias is None else bias.index_select(0, rows))
        return x.split([(heads[1] - heads[0]) * size for size in sizes[first:stop]], dim=-1)

    def _rows(self, x, start, stop):
        """Outputs [start, stop) of c_attn, at the cost of those rows alone where it can be."""
        if not isinstance(self.c_attn, nn.Linear):  # packed weights have their own way
            return self.c_attn.forward_rows(x, start, stop)
        bias = self.c_attn.bias
        return F.linear(
            x, self.c_attn.weight[start:stop], None if bias is None else bias[start:stop]
        )

    def _heads(self, x):  # (B, t, n D) -> (B, n, t, D)
        B, t, width = x.shape
        return x.view(B, t, width // self.config.head_dim, self.config.head_dim).transpose(1, 2)

    def rotation(self, positions):
        """Rope's (cos, sin) for positions (t,) or (B, t): all layers' alike. None without rope."""
        if self.config.position != "rope" or isinstance(positions, tuple):
            return positions if isinstance(positions, tuple) else None
        table = rope_table(
            self.config.head_dim,
            positions.flatten(),
            self.config.rope_theta,
            self.config.rope_scaling,
        )
        if positions.ndim == 2:  # each row of the batch at positions of its own
            table = (part.view(len(positions), 1, -1, part.size(-1)) for part in table)
        return tuple(table)

    def _rotate(self, x, table):  # (B, n, t, D) -> the same, rope applied
        return x if table is None else apply_rope(x, *table)

    def output(self, y):
        """Heads joined and projected: y (B, H, t, D) -> (B, t, C)."""
        y = y.transpose(1, 2).flatten(2)
        return self.resid_dropout(self.c_proj(y))


def stream_dtype(x):
    """dtype of the products of x under autocast, or else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        wide = 2 if config.mlp == "swiglu" else 1  # rows: gate, up
        self.c_fc = nn.Linear(config.n_embd, wide * config.inner, bias=config.bias)
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, t, C) -> (B, t, C)
        dtype = stream_dtype(x)
        if (
            self.kind != "swiglu"
            and torch.is_grad_enabled()
            and mlp_triton.fits(x, dtype, self.c_fc, self.c_proj)
        ):
            w_fc, w_proj = self.c_fc.weight.to(dtype), self.c_proj.weight.to(dtype)
            y = mlp_triton.gelu_mlp(x.to(dtype), w_fc, w_proj, self.kind == "gelu_tanh")
            return self.dropout(y)
        x = self.c_fc(x)
        if self.kind == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """norm, attention, residual, norm, MLP, residual: plain, or row tile by row tile."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.ln_1 = Norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x, inplace=False):
        """x (B, T, C) -> (B, T, C).

        inplace=True lets a tiled policy overwrite x while no gradient is recorded, so that a
        stack of layers needs one residual stream in all.
        """
        if not self.tiled(x):
            return self.plain(x)
        return run_block(self, x, inplace)

    def tiled(self, x):
        """Does the block go tile by tile over x (B, T, C), as things are now?"""
        return tile_sizes(self.config, x.size(1), x.device.type) is not None

    def plain(self, x):
        """The untiled block: K and V of all rows at once, whatever the policy."""
        positions = torch.arange(x.size(1), device=x.device)
        # q, k and v end with this line: they are not held while the MLP runs
        return self.finish(x, attend(*self.norm_qkv(x, positions), self.attention_dropout))

    def norm_qkv(self, x, positions, heads=None):
        """What precedes attention, rows independent: x (B, t, C) -> q, k, v as project_qkv."""
        return self.attn.project_qkv(self.ln_1(x), positions, heads)

    def norm_q(self, x, positions, heads=None):
        return self.attn.project_q(self.ln_1(x), positions, heads)

    def norm_kv(self, x, positions, heads=None):
        return self.attn.project_kv(self.ln_1(x), positions, heads)

    def prefill(self, x, layer):
        """forward over a prompt x (B, T, C), overwritten if tiled, that also fills a cache's
        layer (leangpt/attention/kv_cache.py)."""
        if self.tiled(x):
            fill_cache(self, x, layer)
            return run_block(self, x, inplace=True)
        positions = torch.arange(x.size(1), device=x.device)
        x_norm = self.ln_1(x)
        q, k, v = self.attn.project_qkv(x_norm, positions)
        layer.append(k, v, x_norm)
        y = attend(q, k, v)
        del q, k, v, x_norm
        return self.finish(x, y)

    def decode(self, x, positions, layer):
        """One token a row: x (B, 1, C) at positions (1,) or (B, 1), or their rotation; the past
        in a cache's layer."""
        x_norm = self.ln_1(x)
        if layer.needs == "x":
            q, k, v = self.attn.project_q(x_norm, positions), None, None
        else:
            q, k, v = self.attn.project_qkv(x_norm, positions)
        layer.append(k, v, x_norm)
        return self.finish(x, layer.attend(q, self.attn))

    @property
    def attention_dropout(self):
        """Probability in force now: none outside training."""
        rate = self.config.attention_dropout
        rate = self.config.dropout if rate is None else rate
        return rate if self.training else 0.0

    def finish(self, x, y):
        """What follows attention, rows independent: x (B, t, C), y (B, H, t, D) -> (B, t, C)."""
        x = x + self.attn.output(y)
        del y
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    config_class = GPTConfig  # for those who are handed GPT: readers of files build it themselves

    def __init__(self, config):
        super().__init__()
        self.config = config
        modules = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            modules["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        modules["drop"] = nn.Dropout(config.dropout)
        modules["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
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
        if self.config.position == "learned" and T > self.config.block_size:
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

    def hidden(self, idx):
        """idx (B, T) int64 -> the residual stream after the last block, not normed, (B, T, C)."""
        x = self.embed(idx)
        for block in self.transformer.h:
            x = block(x, inplace=not torch.is_grad_enabled())
        return x

    def forward(self, idx, targets=None):
        """idx (B, T) int64, targets (B, T) int64 with -100 for "ignore", or None.

        Without targets: (logits (B, T, V), None). With them: (None, mean loss), float32; the
        (B T, V) logits never exist at once (layers/loss.py). Raises UserError past block_size.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x)), None
        packed = not isinstance(self.lm_head, nn.Linear)  # int4: evaluated, never trained
        head = self.lm_head.dequantize(x.dtype) if packed else self.lm_head.weight
        loss = chunked_cross_entropy(x, head, targets, self.transformer.ln_f)
        return None, loss

    def compiled(self, T, device_type):
        """This model compiled for training on T tokens: whole, or, where its blocks are tiled,
        what they do row by row; the loops over tiles stay plain Python."""
        if tile_sizes(self.config, T, device_type, training=True) is None:
            return torch.compile(self)
        self.compile_rows()
        return self

    def compile_rows(self):
        """Compile the parts of the blocks that tiles call, one graph for all layers."""
        for block in self.transformer.h:
            for name in ("norm_qkv", "norm_q", "norm_kv", "finish", "plain"):
                setattr(block, name, torch.compile(getattr(block, name)))

    def last_logits(self, idx):
        """idx (B, T) -> logits (B, V) of the last position, the T others' never computed."""
        return self.lm_head(self.transformer.ln_f(self.hidden(idx)[:, -1]))

    def prefill(self, idx, cache, lengths=None):
        """Read prompts idx (B, T) into an empty cache -> logits (B, V) after each.

        lengths: (B,) int64 where prompts padded on the right are shorter than T. The prompt runs
        as in training: tiled, in place, one residual stream in all. No gradients.
        """
        T = idx.size(1)
        x = self.embed(idx, cache.begin(T))
        for block, layer in zip(self.transformer.h, cache.layers):
            x = block.prefill(x, layer)
        cache.advance(T)
        if lengths is None:
            last = x[:, -1]
        else:
            cache.set_lengths(lengths)
            last = x[torch.arange(len(x), device=x.device), lengths.to(x.device) - 1]
        return self.lm_head(self.transformer.ln_f(last))

    def decode_one_token(self, idx, cache):
        """One more token a row, idx (B, 1), after the cache's others -> logits (B, V)."""
        positions = cache.begin(1)
        x = self.embed(idx, positions)
        if self.config.position == "rope":  # one table for all layers
            positions = self.transformer.h[0].attn.rotation(positions)
        for block, layer in zip(self.transformer.h, cache.layers):
            x = block.decode(x, positions, layer)
        cache.advance(1)
        return self.lm_head(self.transformer.ln_f(x[:, -1]))

    def calibration(self):
        """Activations to round 4-bit weights by; see generation.calibration."""
        from leangpt.decoding.generate import (
            calibration,  # above this file: imported when asked for
        )

        return calibration(self)

    @torch.no_grad()
    def even_head(self):
        """The same function from a head that rounds better to few bits; it is untied from then on.

        A column of large weights coarsens the steps of all the others in its group. So each is
        divided by the root of its size, and the last norm's output multiplied by it.
        """
        weight, norm = self.lm_head.weight, self.transformer.ln_f
        size = weight.float().square().mean(0).sqrt()
        root = (size / size.mean().clamp(min=1e-20)).clamp(min=0.01).sqrt()
        self.lm_head.weight = nn.Parameter((weight / root).to(weight.dtype))
        for parameter in norm.parameters():
            parameter.mul_(root)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Sample after idx (B, T) -> (B, T + max_new_tokens); see generation.generate."""
        from leangpt.decoding.generate import generate

        return generate(self, idx, max_new_tokens, temperature, top_k, **options)

    @classmethod
    def from_pretrained(cls, name_or_dir, **overrides):
        """GPT with a published model's weights; see pretrained.load_pretrained."""
        from leangpt.weights.load import load_pretrained

        return load_pretrained(name_or_dir, **overrides)

    def crop_block_size(self, block_size):
        """Shorten the context of a model with learned positions (a shorter wpe table)."""
        if not 0 < block_size <= self.config.block_size:
            raise UserError(f"cannot crop block_size {self.config.block_size} to {block_size}")
        self.config.block_size = block_size
        if self.config.position == "learned":
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])
