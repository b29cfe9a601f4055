"""Decoding speed: tokens a second, beside the bytes that a step reads and what memory can deliver.

    python -m experiments.decoding.generation --part=cpu  2 threads, batch 1, contexts 64, 512, 1000
    python -m experiments.decoding.generation --part=gpu  batch 1 and 64, and a context of 131,072
    python -m experiments.decoding.generation --part=longest  the longest context in 80 GB, by cache

On a GPU a case that fails is printed, leaves its reason in the table, and the others go on.

A GPT-2 124M with random weights (speed does not depend on their values). At a context of n, the
prompt of n tokens is read first, then `tokens` more are written and timed; every contestant has a
turn in each of `rounds` rounds, and its median is reported.

    recompute all   nanoGPT's loop: a whole forward over the text for every token, last logits only
    transformers    its generate with its own KV cache (optional package)
    ours            prefill, then decode_one_token from the KV cache; on CUDA a captured graph
    ours, unfused   on CUDA: the graph with PyTorch's linears and norms in place of our kernels

Writes results/generation.csv; rows of the other parts stay.
"""

import gc
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from configurator import parse_config
from experiments.decoding.contestants import (
    DTYPES,
    SHAPES,
    Ours,
    RecomputeAll,
    Transformers,
    make_model,
    transformers_model,
)
from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from leangpt.kv_cache.cache import build_cache
from leangpt.system.errors import UserError, exit_cleanly, is_out_of_memory
from leangpt.system.timing import synchronize

LONG = 131072  # the long context of part=gpu
BYTES = 80e9  # of part=longest: an H100, also where there is more


@dataclass
class Settings:
    part: str = "cpu"  # cpu | gpu | longest
    shape: str = "124m"  # 124m | tiny
    contexts: str = "64,512,1000"  # tokens before the timed ones
    tokens: int = 16  # timed a round
    rounds: int = 5  # turns of each contestant
    out: str = str(RESULTS / "generation.csv")  # rows of this part are replaced


def main(argv=None):
    settings, _ = parse_config(Settings, argv)
    if settings.part not in ("cpu", "gpu", "longest") or settings.shape not in SHAPES:
        raise UserError("part must be cpu, gpu or longest, and shape 124m or tiny")
    device = "cpu" if settings.part == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"part={settings.part} needs CUDA")
    torch.manual_seed(0)
    table = Table(Path(settings.out), settings.part, provenance(device))
    with torch.inference_mode():
        {"cpu": cpu_rows, "gpu": gpu_rows, "longest": longest_rows}[settings.part](settings, table)
    if not table.rows:
        raise UserError("not one case ran; see above")
    print(f"wrote {table.path}")


class Table:
    """The results file: rows of other parts stay, and each of this part's is written at once."""

    def __init__(self, path, part, origin):
        self.path, self.part, self.origin, self.rows = path, part, origin, []
        old = read_csv(path) if path.exists() else []
        self.kept = [row for row in old if row["part"] != part]

    def add(self, row):
        self.rows.append(dict(part=self.part, **row, **self.origin))
        fields = dict.fromkeys(self.rows[0], "")  # older rows may lack some
        write_csv(self.path, [{**fields, **row} for row in self.kept + self.rows])

    def attempt(self, key, case):
        """Add the row that case() returns, or say why there is none."""
        began = time.perf_counter()
        try:
            self.add(case())
        except Exception as error:
            traceback.print_exc(limit=-3)
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
            self.add(empty_row(key) | dict(failed=f"{type(error).__name__}: {reason}"))
            print(f"{key}: failed, {type(error).__name__}: {reason}", flush=True)
        print(f"    {time.perf_counter() - began:.1f} s, setting up included", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def bandwidth(device):
    """GB/s of reading a large tensor."""
    size = 2**28 if device == "cpu" else 2**31
    x = torch.ones(size // 4, device=device)
    best = 0.0
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        x.sum()
        synchronize(device)
        best = max(best, size / (time.perf_counter() - began) / 1e9)
    return best


def race(contestants, rounds, memory_speed):
    """Rows for {(name, weights, kv, batch, context): contestant}, timed in turns."""
    times = {key: [] for key in contestants}
    for _ in range(rounds):
        for key, contestant in contestants.items():
            times[key].append(contestant())
    return [
        row_of(key, median(times[key]), contestant.bytes_read(), memory_speed)
        for key, contestant in contestants.items()
    ]


def empty_row(key):
    name, weights, kv, batch, context = key
    return dict(
        contestant=name,
        weights=weights,
        kv=kv,
        batch=batch,
        context=context,
        tokens_per_s="",
        ms_per_step="",
        MB_per_step="",
        GB_per_s="",
        memory_GB_per_s="",
        peak_MB="",
        bytes_per_token="",
        longest_context="",
        failed="",
    )


def row_of(key, seconds, bytes_of_step, memory_speed, peak=None):
    name, weights, kv, batch, context = key
    row = empty_row(key) | dict(
        tokens_per_s=round(batch / seconds, 2),
        ms_per_step=round(1e3 * seconds, 4),
        MB_per_step=round(bytes_of_step / 1e6, 2),
        GB_per_s=round(bytes_of_step / seconds / 1e9, 2),
        memory_GB_per_s=round(memory_speed, 1),
        peak_MB="" if peak is None else round(peak / 1e6, 1),
    )
    print(
        f"{name:14} {weights:9} kv {kv:9} batch {batch:3} context {context:7}: "
        f"{row['tokens_per_s']:10,.1f} tokens/s, {row['GB_per_s']:8,.1f} of "
        f"{memory_speed:,.0f} GB/s" + ("" if peak is None else f", peak {peak / 1e6:,.0f} MB"),
        flush=True,
    )
    return row


def print_kernels(contestant, steps=4, shown=8):
    """One line: how many kernels a step runs, and which take longest (microseconds a step)."""
    from torch.profiler import ProfilerActivity, profile

    try:
        contestant.back()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(steps):
                contestant.steps.next()
            torch.cuda.synchronize()
        found = [
            (e.self_device_time_total / steps, e.count / steps, e.key[:48])
            for e in recorded.key_averages()
            if e.self_device_time_total > 0
        ]
        top = "; ".join(
            f"{name} {count:.0f}x {time:.0f}"
            for time, count, name in sorted(found, reverse=True)[:shown]
        )
        print(
            f"    {sum(n for _, n, _ in found):.0f} kernels a step, "
            f"{sum(time for time, _, _ in found):.0f} us in them: {top}",
            flush=True,
        )
    except Exception as error:  # a machine may not allow it
        print(f"    no profile: {error}", flush=True)


def cpu_rows(settings, table):
    models = {
        "float32": make_model(settings),
        "bfloat16": make_model(settings, "bfloat16"),
        "int4": make_model(settings, "bfloat16", int4=True),
    }
    peers = {dtype: transformers_model(settings, dtype) for dtype in DTYPES}
    memory_speed, tokens = bandwidth("cpu"), settings.tokens
    for context in map(int, settings.contexts.split(",")):
        contestants = {
            ("recompute all", "float32", "none", 1, context): RecomputeAll(
                models["float32"], context, tokens
            )
        }
        for dtype, peer in peers.items():
            if peer is not None:
                contestants[("transformers", dtype, dtype, 1, context)] = Transformers(
                    peer, context, tokens
                )
        for weights, model in models.items():
            kv = "float32" if weights == "float32" else "bfloat16"
            contestants[("ours", weights, kv, 1, context)] = Ours(model, 1, context, tokens)
        for row in race(contestants, settings.rounds, memory_speed):
            table.add(row)


def gpu_rows(settings, table):
    """Batch 1 first, then the long context, the large batch, and who else there is."""
    memory_speed, tokens = bandwidth("cuda"), settings.tokens
    contexts, long = list(map(int, settings.contexts.split(","))), LONG
    middle = contexts[len(contexts) // 2]
    models = {
        "bfloat16": make_model(settings, "bfloat16", device="cuda"),
        "int4": make_model(settings, "bfloat16", int4=True, device="cuda"),
        "long": make_model(
            settings, "bfloat16", device="cuda", position="rope", block_size=long + 4 * tokens
        ),
    }
    kernels_of = {
        ("ours", "bfloat16", 1, middle, None),
        ("ours", "int4", 1, middle, None),
        ("ours", "long", 1, long, None),
        ("ours", "long", 1, long, 4),
        ("ours", "bfloat16", 64, middle, None),
    }
    cases = [
        ("ours", weights, 1, context, None)
        for context in sorted(contexts, key=middle.__ne__)
        for weights in ("bfloat16", "int4")
    ]
    cases += [("ours", "long", 1, long, kv_bits) for kv_bits in (None, 4, 8)]
    cases += [("ours", "bfloat16", 64, context, None) for context in contexts]
    cases += [("ours, unfused", weights, 1, middle, None) for weights in ("bfloat16", "int4")]

    def timed(case, key):
        name, weights, batch, context, kv_bits = case
        model = models[weights]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant = Ours(
            model, batch, context, tokens, kv_bits, prefill=weights != "long", fused=name == "ours"
        )
        seconds = median(contestant() for _ in range(settings.rounds))
        own = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        peak = torch.cuda.max_memory_allocated() - before + own
        row = row_of(key, seconds, contestant.bytes_read(), memory_speed, peak)
        if case in kernels_of:
            print_kernels(contestant)
        return row

    for case in cases:
        name, weights, batch, context, kv_bits = case
        kv = "bfloat16" if kv_bits is None else f"int{kv_bits}"
        key = (name, "bfloat16" if weights == "long" else weights, kv, batch, context)
        table.attempt(key, partial(timed, case, key))

    peer = transformers_model(settings, "bfloat16", "cuda")

    def peers_time(key):
        contestant = Transformers(peer, key[-1], tokens)
        contestant()
        return row_of(
            key,
            median(contestant() for _ in range(settings.rounds)),
            contestant.bytes_read(),
            memory_speed,
        )

    for context in contexts if peer is not None else ():
        key = ("transformers", "bfloat16", "bfloat16", 1, context)
        table.attempt(key, partial(peers_time, key))


def longest_rows(settings, table):
    """The longest context of one sequence in BYTES: computed, then decoded at."""
    memory_speed = bandwidth("cuda")
    torch.cuda.empty_cache()
    for case in [
        ("cache", None, None),
        ("cache", None, 8),
        ("cache", None, 4),
        ("grouped", 3, None),
        ("grouped", 3, 4),
        ("recompute", None, None),
        ("recompute", None, 4),
    ]:
        kv = "bfloat16" if case[2] is None else f"int{case[2]}"
        key = (case[0], "bfloat16", kv, 1, "")
        table.attempt(key, partial(longest_row, settings, memory_speed, key, *case))


def longest_row(settings, memory_speed, key, policy, n_kv_head, kv_bits):
    if n_kv_head and SHAPES[settings.shape]["n_head"] % n_kv_head:
        n_kv_head = 1
    options = dict(attention_policy=policy, n_kv_head=n_kv_head, position="none", block_size=2**31)
    model = make_model(settings, "bfloat16", device="cuda", **options)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # what the text itself and the cache's slot numbers take: int64, 8 bytes a token each
    per_token = build_cache(model.config, 1, 4096, "cuda", torch.bfloat16, kv_bits).bytes_per_token
    free, _ = torch.cuda.mem_get_info()
    room = min(BYTES - weights, free * 0.97)
    longest = int(room / (per_token + 24)) // 4096 * 4096
    tile = 2**17 if policy == "recompute" else None  # fewer, larger tiles than a CPU's
    tried, row = longest - 64, None
    while row is None and tried > 0:
        torch.cuda.reset_peak_memory_stats()
        try:
            contestant = Ours(model, 1, tried, 2, kv_bits, prefill=False, tile=tile)
            row = row_of(
                (*key[:4], tried),
                contestant(),
                contestant.bytes_read(),
                memory_speed,
                torch.cuda.max_memory_allocated(),
            )
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tried = int(tried * 0.95)
        contestant = None
        gc.collect()
        torch.cuda.empty_cache()
    return row | dict(bytes_per_token=per_token, longest_context=longest)


if __name__ == "__main__":
    exit_cleanly(main)
