"""Who decodes in generation.py's races: ours, nanoGPT's loop, transformers."""

import time

import torch
from torch.nn import functional as F

from leangpt.decoding.generate import bytes_read
from leangpt.decoding.sampling import Sampler
from leangpt.decoding.steps import DecodeLoop, TokenRows
from leangpt.int4.quantize import quantize_
from leangpt.kv_cache.cache import build_cache
from leangpt.system.timing import synchronize
from model import GPT, GPTConfig

SHAPES = {
    "124m": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304),
    "tiny": dict(n_layer=2, n_head=4, n_embd=128, vocab_size=512),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_model(settings, dtype="float32", int4=False, device="cpu", **options):
    """The shape's GPT in evaluation mode, random weights."""
    shape = SHAPES[settings.shape] | {"block_size": 1024} | options
    with torch.device(device):
        model = GPT(GPTConfig(**shape)).eval()
    if int4:
        quantize_(model)
    return model.to(DTYPES[dtype])


class Ours:
    """Decoding from a KV cache at a context that can be set back."""

    def __init__(
        self, model, batch, context, tokens, kv_bits=None, prefill=True, fused=True, tile=None
    ):
        self.model, self.batch, self.context, self.tokens = model, batch, context, tokens
        self.kv_bits = kv_bits
        weight = model.transformer.wte.weight
        idx = torch.randint(model.config.vocab_size, (batch, context), device=weight.device)
        self.cache = build_cache(
            model.config, batch, context + tokens + 1, weight.device, weight.dtype, kv_bits
        )
        self.cache.tile = tile or self.cache.tile
        self.rows = TokenRows(idx, None, tokens + 1)
        self.loop = DecodeLoop(model, self.cache, Sampler(top_k=200), self.rows)
        if not fused:
            self.loop.decode = model.decode_one_token
        if prefill:
            self.loop.prefill(idx, None)
        else:  # long contexts: any numbers will do, but zeros, which some chips read faster
            for tensor in (t for layer in self.cache.layers for t in layer.tensors()):
                tensor.random_(256) if tensor.dtype == torch.uint8 else tensor.normal_()
            self.rows.add(idx[:, 0], 0.0)
        self.back()
        self.loop.next()  # capture

    def back(self):
        self.cache.length = self.context
        self.cache.positions.fill_(self.context)
        self.rows.ends.fill_(self.context + 1)
        self.rows.length = self.context + 1

    def __call__(self):
        """Seconds a step."""
        self.back()
        device = self.rows.token.device
        synchronize(device.type)
        began = time.perf_counter()
        for _ in range(self.tokens):
            self.loop.next()
        synchronize(device.type)
        return (time.perf_counter() - began) / self.tokens

    def bytes_read(self):
        weights, cache = bytes_read(self.model, self.context + self.tokens / 2, self.kv_bits)
        return weights + self.batch * cache


class RecomputeAll:
    """nanoGPT's generate: the whole (cropped) text through the model for every token."""

    def __init__(self, model, context, tokens):
        self.model, self.tokens = model, max(1, tokens // 8)  # it is slow
        self.idx = torch.randint(model.config.vocab_size, (1, context))

    def __call__(self):
        idx = self.idx
        began = time.perf_counter()
        for _ in range(self.tokens):
            logits = self.model.last_logits(idx[:, -self.model.config.block_size :])
            kept = logits.topk(200).values[:, -1:]
            p = F.softmax(logits.masked_fill(logits < kept, -torch.inf), dim=-1)
            idx = torch.cat([idx, torch.multinomial(p, 1)], dim=1)
        return (time.perf_counter() - began) / self.tokens

    def bytes_read(self):
        return bytes_read(self.model, 0)[0]


class Transformers:
    """GPT2LMHeadModel.generate with its KV cache: n + tokens tokens less the first."""

    def __init__(self, model, context, tokens):
        self.model, self.tokens = model, tokens
        self.idx = torch.randint(model.config.vocab_size, (1, context), device=model.device)

    def __call__(self):
        return (self.seconds(self.tokens + 1) - self.seconds(1)) / self.tokens

    def seconds(self, count):
        synchronize(self.model.device.type)
        began = time.perf_counter()
        self.model.generate(
            self.idx,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=True,
            top_k=200,
            pad_token_id=0,
        )
        synchronize(self.model.device.type)
        return time.perf_counter() - began

    def bytes_read(self):
        position = self.model.transformer.wpe.weight
        size = sum(p.numel() for p in self.model.parameters()) - position.numel()
        cache = 2 * self.idx.size(1) * self.model.config.n_embd * self.model.config.n_layer
        return (size + cache) * position.element_size()


def transformers_model(settings, dtype, device="cpu"):
    """The same shape in transformers, or None where it is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    shape = SHAPES[settings.shape]
    config = GPT2Config(**shape, n_positions=1024, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval().to(device, DTYPES[dtype])
