"""What 4-bit weights and quantised keys and values cost: loss, and divergence from the exact model.

    python train.py config/demo_shakespeare_char.py --out_dir=out-shakespeare-char \\
        --optimizer_variant=muonsn8
    python data/smollm2/prepare.py
    PYTHONPATH=.cache/peers python -m experiments.decoding.generation_quality

Two models: the character model in `out_dir`, over its whole validation split, and SmolLM2-135M over
the first `windows` windows of `tokens` tokens of the same split's text. Every linear layer is
rounded, the head's copy too:

    minimum and maximum   16 equal steps from the least to the greatest weight of a group
    torchao, torchao HQQ  torchao's 4-bit weights for CPUs, where it can be imported
    clipping range        ours from the weights alone (int4_rounding.fit_groups)
    calibrated            ours on a text that the model writes itself, once for each seed
    calibrated on data    ours on SAMPLE tokens of the training split: text like that measured
    calibrated, fitted    then scales and zeros fitted to the exact model's predictions
                          (leangpt/int4/tuning.py), `tune` steps: the character model, groups of 32

Keys and values: each window decoded token by token from a cache, so that every prediction sees
quantised rows but for the newest RECENT; SmolLM2's predictions count from CONTEXT tokens on.

Writes results/generation_quality.csv: mean loss, its change and the Kullback-Leibler divergence
from the exact model's predictions, in nats a token; and the seconds that calibrated rounding took,
writing its text included, there and for weights in the shape of GPT-2 124M.
"""

import copy
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from configurator import parse_config
from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from leangpt.int4.calibration import calibration, even_head_, quantize_gpt_
from leangpt.int4.quantize import quantize_
from leangpt.int4.tuning import quantize_and_tune_
from leangpt.kv_cache.cache import build_cache
from leangpt.layers.int4_layouts import dequantize
from leangpt.layers.int4_linear import GROUP_SIZES
from leangpt.runs.checkpoint import load_checkpoint, model_from_checkpoint
from leangpt.system.errors import UserError, exit_cleanly
from leangpt.text.dataset import load_dataset
from leangpt.weights.chat_text import load_pretrained_text
from leangpt.weights.load import load_pretrained
from model import GPT, GPTConfig

ROWS = 256  # blocks of the character model at a time
CONTEXT = 512  # tokens before SmolLM2's first counted prediction from quantised keys and values
TOKENS = 4096  # whose logits are held at a time
SAMPLE = 2**14  # tokens of the training split to calibrate on
KV_BITS = (None, 8, 4)  # the exact cache first
PARTS = ("all", "characters", "pretrained", "seconds")


@dataclass
class Settings:
    out_dir: str = "out-shakespeare-char"  # whose ckpt.pt is measured
    dataset: str = "shakespeare_char"  # its data set, whose text SmolLM2 reads too
    data_dir: str = "data"  # the folder of data sets
    pretrained: str | None = "data/smollm2"  # published weights; None: leave them out
    windows: int = 8  # of the text, for the published weights
    tokens: int = 768  # in each window
    seeds: int = 4  # calibration texts tried
    tune: int = 600  # steps of fitting, two minutes each time; 0: leave them out
    part: str = "all"  # all | characters | pretrained | seconds: the others' rows stay
    out: str = str(RESULTS / "generation_quality.csv")  # where the rows go


def main(argv=None):
    settings, _ = parse_config(Settings, argv)
    if settings.tokens <= CONTEXT or settings.windows < 1 or settings.seeds < 1:
        raise UserError(f"tokens must be more than {CONTEXT}, windows and seeds at least 1")
    if settings.part not in PARTS:
        raise UserError(f"part must be {', '.join(PARTS)}")
    dataset, origin = load_dataset(settings.dataset, settings.data_dir), provenance()
    if settings.part in ("all", "seconds"):
        replace(settings.out, [seconds_of_gpt2()], origin)
    if settings.part in ("all", "characters"):
        model = model_from_checkpoint(
            GPT, load_checkpoint(Path(settings.out_dir) / "ckpt.pt")
        ).eval()
        batches = list(dataset.full_split_batches("val", model.config.block_size, ROWS))
        rows = measure(
            "characters",
            model,
            batches,
            0,
            settings.seeds,
            tune=settings.tune,
            sample=sample(dataset.split("train"), model.config.block_size),
        )
        replace(settings.out, rows, origin)
    if settings.part in ("all", "pretrained") and settings.pretrained:
        model = load_pretrained(GPT, settings.pretrained)
        encode = load_pretrained_text(settings.pretrained).tokenizer.encode
        val, train = (
            encode(dataset.tokenizer().decode(part.tolist()))
            for part in (dataset.split("val"), dataset.split("train")[: 8 * SAMPLE])
        )
        batches = windows(val, settings.windows, settings.tokens)
        rows = measure(
            "SmolLM2-135M",
            model,
            batches,
            CONTEXT,
            settings.seeds,
            groups=(32,),
            sample=sample(train, model.config.block_size),
        )
        replace(settings.out, rows, origin)
    print(f"wrote {settings.out}")


def replace(path, rows, origin):
    """Write these rows of one model in place of those that the file has of it."""
    old = read_csv(path) if Path(path).exists() else []
    kept = [row for row in old if row.get("model", rows[0]["model"]) != rows[0]["model"]]
    new = [row | origin for row in rows]
    write_csv(path, [{name: row.get(name) for name in new[0]} for row in kept] + new)


def seconds_of_gpt2():
    """A row: how long it takes to quantise the shape of GPT-2 124M, its text written included."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768))
    quantize_gpt_(
        GPT(GPTConfig(block_size=64, vocab_size=64, n_layer=1, n_head=2, n_embd=64))
    )  # warm
    began = time.perf_counter()
    quantize_gpt_(model.eval())
    seconds = round(time.perf_counter() - began, 1)
    print(f"GPT-2 124M's shape quantised in {seconds} s", flush=True)
    return row_of("GPT-2 124M shape", "weights", "calibrated", 32, 5.0, 0, seconds=seconds)


def row_of(model, what, rule, group, bits, seed="", seconds="", loss="", change="", divergence=""):
    return dict(
        model=model,
        what=what,
        rule=rule,
        group=group,
        bits=bits,
        seed=seed,
        loss=loss,
        change=change,
        divergence=divergence,
        seconds=seconds,
    )


def windows(ids, count, tokens):
    """The first `count` windows of ids as one batch [(x, y)], each (count, tokens) int64."""
    if len(ids) <= count * tokens:
        raise UserError(f"the text has {len(ids)} tokens, {count} windows of {tokens} need more")
    ids = torch.tensor(ids[: count * tokens + 1])
    return [(ids[:-1].view(count, tokens), ids[1:].view(count, tokens))]


def sample(ids, block_size):
    """The first SAMPLE ids as texts (n, tokens) int64."""
    tokens = min(256, block_size)
    return torch.tensor(ids[: SAMPLE // tokens * tokens]).long().view(-1, tokens)


def measure(name, model, batches, context, seeds, groups=GROUP_SIZES, sample=None, tune=0):
    """Rows (dicts) of every rounding of the model's weights, then of its keys and values.

    sample (rows, tokens) int64: text to calibrate on, besides the model's own. tune: steps of
    fitting at the smallest group, or none.
    """
    rows = []

    def report(what, rule, group, bits, found, exact, seed="", seconds=""):
        loss, divergence = found
        rows.append(
            row_of(
                name,
                what,
                rule,
                group,
                bits,
                seed,
                seconds,
                round(loss, 5),
                round(loss - exact, 5),
                round(divergence, 5),
            )
        )
        print(
            f"{name:12} {what:8} {rule:22} group {group:4} {bits:5} bits: {loss:.5f} "
            f"({loss - exact:+.5f}), divergence {divergence:.5f}",
            flush=True,
        )

    quality = partial(compare, exact=list(predictions(model, batches)), batches=batches)
    found = quality(model)
    exact = found[0]
    report("weights", "exact", "", 32, found, exact)
    for group in groups:
        if any(m.in_features % group for m in model.modules() if isinstance(m, nn.Linear)):
            continue
        bits = 4 + 32 / group
        rounded = with_weights(model, lambda weight, group=group: min_max(weight, group))
        report("weights", "minimum and maximum", group, bits, quality(rounded), exact)
        for rule, rounding in torchao_rules(group).items():
            rounded = with_weights(model, rounding)
            report("weights", rule, group, 4 + 64 / group, quality(rounded), exact)
        rounded = quantize_(even_head_(copy.deepcopy(model)), group)
        report("weights", "clipping range", group, bits, quality(rounded), exact)
        for seed in range(seeds):
            rounded, began = copy.deepcopy(model), time.perf_counter()
            quantize_gpt_(rounded, group, calibration(rounded, seed=seed))
            seconds = round(time.perf_counter() - began, 1)
            report("weights", "calibrated", group, bits, quality(rounded), exact, seed, seconds)
            if tune and group == min(groups):
                rounded, began = copy.deepcopy(model), time.perf_counter()
                quantize_and_tune_(rounded, group, tune, seed)
                seconds = round(time.perf_counter() - began, 1)
                report(
                    "weights",
                    "calibrated, fitted",
                    group,
                    bits,
                    quality(rounded),
                    exact,
                    seed,
                    seconds,
                )
        if sample is not None:
            rounded = copy.deepcopy(model)
            quantize_gpt_(rounded, group, calibration(rounded, text=sample))
            report("weights", "calibrated on data", group, bits, quality(rounded), exact)
    found = decode(model, batches, context)
    for kv_bits, one in zip(KV_BITS, found):
        report(
            "kv cache",
            "minimum and maximum" if kv_bits else "exact",
            model.config.head_dim // 2 if kv_bits else "",
            kv_bits or 32,
            one,
            found[0][0],
        )
    return rows


@torch.no_grad()
def predictions(model, batches):
    """Log probabilities (n, T, V) of whole forwards over the batches, TOKENS at a time."""
    for x, _ in batches:
        for rows in x.split(max(1, TOKENS // x.size(1))):
            yield model(rows, None)[0].float().log_softmax(-1)


def compare(model, exact, batches):
    """(mean loss, mean divergence from `exact`, a list of predictions) of a model."""
    total = Sums()
    wanted = (y for _, whole in batches for y in whole.split(max(1, TOKENS // whole.size(1))))
    for log_p, log_q, y in zip(exact, predictions(model, batches), wanted):
        total.add(log_p, log_q, y)
    return total.means()


@torch.no_grad()
def decode(model, batches, context):
    """The same for each of KV_BITS, every token decoded from a cache; counted from `context` on."""
    totals = [Sums() for _ in KV_BITS]
    for x, y in batches:
        caches = [build_cache(model.config, len(x), x.size(1), kv_bits=bits) for bits in KV_BITS]
        for t in range(x.size(1)):
            found = [model.decode_one_token(x[:, t : t + 1], cache) for cache in caches]
            if t >= context:
                found = [logits.float().log_softmax(-1) for logits in found]
                for total, log_q in zip(totals, found):
                    total.add(found[0], log_q, y[:, t])
    return [total.means() for total in totals]


class Sums:
    """Loss and divergence so far."""

    def __init__(self):
        self.loss = self.divergence = self.count = 0

    def add(self, log_p, log_q, y):
        """log_p (exact), log_q: log probabilities (..., V); y (...) the tokens that came."""
        self.loss -= log_q.gather(-1, y.unsqueeze(-1)).double().sum().item()
        self.divergence += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        self.count += y.numel()

    def means(self):
        return self.loss / self.count, self.divergence / self.count


@torch.no_grad()
def with_weights(model, rounding):
    """A copy of the model whose linears hold rounding(weight); the head leaves its table alone."""
    rounded = copy.deepcopy(model)
    for name, linear in list(rounded.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            replacement = copy.deepcopy(linear)
            replacement.weight = nn.Parameter(rounding(linear.weight.detach()))
            setattr(rounded.get_submodule(parent), child, replacement)
    return rounded


def min_max(weight, group):
    x = weight.unflatten(-1, (-1, group))
    low, high = x.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    codes = ((x - zero[..., None].float()) / scale[..., None].float() + 8).round().clamp(0, 15)
    scale_zero = torch.stack([scale.T, zero.T], dim=-1)
    return dequantize(codes.flatten(-2).to(torch.uint8), scale_zero, torch.float32)


def torchao_rules(group):
    """{rule: weight -> weight} of torchao's layout for CPUs, float32 scales and zeros."""
    try:
        from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
        from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm
    except ImportError:
        print("torchao is not there: left out", flush=True)
        return {}

    def rounding(weight, algorithm):
        N, K = weight.shape
        padded = F.pad(weight, (0, 0, 0, -N % 64))  # its kernel takes whole blocks of rows
        packed = Int4OpaqueTensor.from_hp(padded, [1, group], algorithm)
        return F.linear(torch.eye(K), packed).T[:N].contiguous()

    return {
        rule: lambda weight, kind=kind: rounding(weight, getattr(Int4ChooseQParamsAlgorithm, kind))
        for rule, kind in (("torchao", "TINYGEMM"), ("torchao HQQ", "HQQ"))
    }


if __name__ == "__main__":
    exit_cleanly(main)
