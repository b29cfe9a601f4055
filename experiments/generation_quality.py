"""What 4-bit weights and quantised keys and values cost in validation loss.

    python experiments/generation_quality.py --out_dir=out-shakespeare-char

The whole validation split in blocks of block_size. Weights: every linear layer rounded, the head's
copy too, by minimum and maximum, by clipping range (weights alone), and calibrated on a text the
model writes itself, with three seeds. Keys and values: each block decoded token by token from a
cache, so that every prediction sees quantised rows but for the newest RECENT.

Writes results/generation_quality.csv: loss and its change, in nats a token.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import load_checkpoint, model_from_checkpoint
from configurator import parse_config
from dataset import load_dataset
from errors import exit_cleanly
from experiments.common import RESULTS, provenance, write_csv
from generation import calibration
from int4 import GROUP_SIZES, dequantize, quantize_, storage_bits
from kv_cache import build_cache

ROWS = 256  # blocks at a time


@dataclass
class Settings:
    out_dir: str = "out-shakespeare-char"  # whose ckpt.pt is measured
    dataset: str = "shakespeare_char"  # its data set
    data_dir: str = "data"  # the folder of data sets
    out: str = str(RESULTS / "generation_quality.csv")  # where the rows go


def main(argv=None):
    settings, _ = parse_config(Settings, argv)
    model = model_from_checkpoint(load_checkpoint(Path(settings.out_dir) / "ckpt.pt")).eval()
    dataset = load_dataset(settings.dataset, settings.data_dir)
    batches = list(dataset.full_split_batches("val", model.config.block_size, ROWS))
    exact, rows = forward_loss(model, batches), []

    def report(what, rule, group, bits, loss):
        rows.append(dict(what=what, rule=rule, group=group, bits=bits, loss=round(loss, 5),
                         change=round(loss - exact, 5)))
        print(f"{what:8} {rule:22} group {group:4} {bits:5} bits: {loss:.5f} ({loss - exact:+.5f})",
              flush=True)

    report("weights", "exact", "", 32, exact)
    for group in GROUP_SIZES:
        if model.config.n_embd % group:
            continue
        report("weights", "minimum and maximum", group, 4 + 32 / group,
               min_max_loss(model, group, batches))
        for rule, seed in [("clipping range", None), *((f"calibrated, seed {s}", s)
                                                       for s in range(3))]:
            packed = copy.deepcopy(model)
            quantize_(packed, group, seed is not None and calibration(packed, seed=seed))
            report("weights", rule, group, storage_bits(packed), forward_loss(packed, batches))
    for kv_bits in (None, 8, 4):
        loss = decode_loss(model, batches, kv_bits)
        report("kv cache", "exact" if kv_bits is None else "minimum and maximum",
               "" if kv_bits is None else model.config.head_dim // 2, kv_bits or 32, loss)
    origin = provenance()
    write_csv(settings.out, [row | origin for row in rows])
    print(f"wrote {settings.out}")


@torch.no_grad()
def forward_loss(model, batches):
    """Mean loss over the batches, from whole forwards."""
    total = count = 0
    for x, y in batches:
        logits, _ = model(x)
        total += F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).item() * y.numel()
        count += y.numel()
    return total / count


@torch.no_grad()
def decode_loss(model, batches, kv_bits):
    """The same, every token decoded from a KV cache."""
    total = count = 0
    for x, y in batches:
        cache = build_cache(model.config, len(x), x.size(1), kv_bits=kv_bits)
        for t in range(x.size(1)):
            logits = model.decode_one_token(x[:, t:t + 1], cache)
            total += F.cross_entropy(logits, y[:, t], reduction="sum").item()
        count += y.numel()
    return total / count


@torch.no_grad()
def min_max_loss(model, group, batches):
    """Loss with every linear's weights rounded to 16 steps from least to greatest of a group."""
    rounded = copy.deepcopy(model)
    for name, linear in list(rounded.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            replacement = copy.deepcopy(linear)  # the head leaves its table alone
            replacement.weight = nn.Parameter(min_max(linear.weight, group))
            setattr(rounded.get_submodule(parent), child, replacement)
    return forward_loss(rounded, batches)


def min_max(weight, group):
    x = weight.unflatten(-1, (-1, group))
    low, high = x.aminmax(dim=-1)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    codes = ((x - zero[..., None].float()) / scale[..., None].float() + 8).round().clamp(0, 15)
    scale_zero = torch.stack([scale.T, zero.T], dim=-1)
    return dequantize(codes.flatten(-2).to(torch.uint8), scale_zero, torch.float32)


if __name__ == "__main__":
    exit_cleanly(main)
