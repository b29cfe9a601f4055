"""Attention policies on one CUDA GPU, bf16, GPT-2 124M shape -> results/attention_gpu.csv

    python -m experiments.attention.attention_gpu --sections=check,prefill,train \
        --nanogpt=nanoGPT/model.py

check    every CUDA kernel, the tiled block and the chunked loss against float32 plain PyTorch
prefill  the 12-layer stack over T tokens without gradients: plain (cuDNN) beside recompute
train    forward, backward and optimizer step over one long sequence, beside nanoGPT's
short    tokens per second at T=1024, B=32, beside nanoGPT's

nanoGPT's model.py is not part of this repository: give its path with --nanogpt, or its rows are
left out. Both sides run in this one process, alternating where a run is short. GB are 10^9 bytes.
Rows of the sections not run stay.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

from experiments.shared.common import RESULTS, provenance, read_csv, write_csv
from leangpt.attention.tile_kernels import KERNELS
from leangpt.layers.loss import chunked_cross_entropy
from leangpt.optim import build_optimizer
from model import GPT, GPTConfig

DEVICE = "cuda"
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304)


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def check(row, quick):
    """Kernels, block and loss in bf16 against plain float32 on the same numbers."""
    torch.manual_seed(0)
    for H, G in ((12, 12), (12, 4)):
        shapes = ((1, H, 512, 64), (1, G, 512, 64), (1, G, 512, 64))
        q, k, v = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in shapes)
        grad = torch.randn_like(q)
        for causal in (True, False):
            forward, backward = KERNELS["math"]
            wide = [x.float() for x in (q, k, v)]
            out, lse = forward(*wide, causal)
            grads = backward(grad.float(), *wide, out, lse, causal)
            for name in ("flash", "cudnn"):
                fast_forward, fast_backward = KERNELS[name]
                fast = fast_forward(q, k, v, causal)
                fast_grads = fast_backward(grad, q, k, v, *fast, causal)
                row(
                    f"check {name} G={G} causal={causal}",
                    out_error=relative(fast[0], out),
                    lse_error=relative(fast[1], lse),
                    grad_error=max(relative(a, b) for a, b in zip(fast_grads, grads)),
                )

    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(700, 64, device=DEVICE).to(dtype).requires_grad_()
        weight = torch.randn(1003, 64, device=DEVICE, requires_grad=True)
        targets = torch.randint(1003, (700,), device=DEVICE)
        targets[::50] = -100
        wide = torch.nn.functional.cross_entropy(
            hidden.float() @ weight.to(dtype).float().T, targets
        )
        expected = torch.autograd.grad(wide, (hidden, weight))
        loss = chunked_cross_entropy(hidden, weight, targets)
        grads = torch.autograd.grad(loss, (hidden, weight))
        row(
            f"check loss {dtype}",
            out_error=relative(loss, wide),
            grad_error=max(relative(a, b) for a, b in zip(grads, expected)),
        )

    T = 4096
    for settings in (
        dict(attention_policy="cache"),
        dict(attention_policy="cache", q_chunk=1024),
        dict(attention_policy="recompute", q_chunk=1024, k_chunk=512),
        dict(attention_policy="recompute", q_chunk=1024, k_chunk=512, n_kv_head=4),
        dict(attention_policy="recompute", q_chunk=1000, k_chunk=300),
        dict(attention_policy="recompute", q_chunk=1024, checkpoint_layers=True),
        dict(attention_policy="recompute", q_chunk=1024, checkpoint_layers=True, offload=True),
    ):
        torch.manual_seed(1)
        base = dict(
            block_size=T,
            n_layer=3,
            n_head=12,
            n_embd=768,
            vocab_size=1024,
            position="rope",
            n_kv_head=settings.get("n_kv_head"),
        )
        plain = GPT(GPTConfig(**base)).to(DEVICE)
        tiled = GPT(GPTConfig(**{**base, **settings})).to(DEVICE)
        tiled.load_state_dict(plain.state_dict())
        idx = torch.randint(1024, (2, T), device=DEVICE)
        _, wide = plain(idx, idx.roll(-1, 1))
        wide.backward()
        with torch.autocast(DEVICE, torch.bfloat16):
            _, loss = tiled(idx, idx.roll(-1, 1))
        loss.backward()
        with torch.no_grad():
            expected = plain.last_logits(idx)
            with torch.autocast(DEVICE, torch.bfloat16):
                found = tiled.last_logits(idx)
        row(
            f"check gpt {settings}",
            out_error=relative(found, expected),
            grad_error=max(
                relative(a.grad, b.grad) for a, b in zip(tiled.parameters(), plain.parameters())
            ),
        )


def timed(fn, repeats=1):
    """(median seconds, peak bytes beyond what stood before) of fn()."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() - before
    return statistics.median(seconds), peak


def prefill(row, quick):
    """The residual stream through 12 random blocks and the last row's logits."""
    lengths = (4096,) if quick else (131_072, 1_048_576)
    for T in lengths:
        variants = [
            ("cache", None, None),
            ("recompute", 8192, 8192),
            ("recompute", 16384, 8192),
            ("recompute", 16384, 16384),
            ("recompute", 32768, 32768),
            ("cache", 16384, 16384),
        ]
        if quick:
            variants = [("cache", None, None), ("recompute", 1024, 512)]
        elif T > 500_000:
            variants = [variants[0], variants[2], variants[4]]
        torch.manual_seed(0)
        idx = torch.randint(GPT2["vocab_size"], (1, T), device=DEVICE)
        reference = None
        for policy, q_chunk, k_chunk in variants:
            torch.manual_seed(0)
            model = GPT(
                GPTConfig(
                    block_size=T,
                    position="none",
                    attention_policy=policy,
                    q_chunk=q_chunk,
                    k_chunk=k_chunk,
                    **GPT2,
                )
            )
            model = model.to(DEVICE, torch.bfloat16).eval()
            found = {}

            def run(model=model, found=found):
                with torch.inference_mode():
                    found["logits"] = model.last_logits(idx)

            with torch.inference_mode():  # kernels and cuDNN plans are ready before the clock
                model.last_logits(idx[:, : 2 * (q_chunk or T // 64)])
                if T < 500_000:
                    model.last_logits(idx)
            try:
                seconds, peak = timed(run, 3 if T < 500_000 else 1)
            except torch.OutOfMemoryError:
                row("prefill", T=T, policy=policy, q_chunk=q_chunk, k_chunk=k_chunk, status="oom")
                continue
            reference = found["logits"] if reference is None else reference
            row(
                "prefill",
                T=T,
                policy=policy,
                q_chunk=q_chunk,
                k_chunk=k_chunk,
                seconds=seconds,
                peak_GB=peak / 1e9,
                out_error=relative(found["logits"], reference),
            )
            del model, run
            gc.collect()
            torch.cuda.empty_cache()


def load_nanogpt(path):
    """nanoGPT's model.py as a module, or None."""
    if not path or not Path(path).exists():
        return None
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def trainer(kind, T, B, nanogpt=None, compiled=False, **settings):
    """(step function, total bytes it stands on): forward, backward, AdamW, bf16 autocast."""
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated()
    if kind == "nanogpt":
        config = nanogpt.GPTConfig(block_size=T, bias=False, dropout=0.0, **GPT2)
        model = nanogpt.GPT(config).to(DEVICE)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), DEVICE)
    else:
        model = GPT(GPTConfig(block_size=T, **{**GPT2, **settings})).to(DEVICE)
        optimizer = build_optimizer(model, "adam", learning_rate=6e-4)
    run = torch.compile(model) if compiled else model
    tiled = settings.get("attention_policy") == "recompute" and not compiled
    if tiled:
        model.compile_rows()
    idx = torch.randint(GPT2["vocab_size"], (B, T), device=DEVICE)
    targets = idx.roll(-1, 1)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            _, loss = run(idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step.loss = loss

    return step, before


def train_rows(row, cases, T, B, repeats, nanogpt):
    """One case after another; peak counts everything: weights, gradients, state, activations."""
    for name, case in cases:
        if case["kind"] == "nanogpt" and nanogpt is None:
            continue
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        try:
            step, before = trainer(T=T, B=B, nanogpt=nanogpt, **case)
            for _ in range(0 if T > 500_000 else 3):
                step()
            seconds, _ = timed(step, repeats)
            peak = torch.cuda.max_memory_allocated() - before
            row(
                name,
                T=T,
                B=B,
                policy=case.get("attention_policy"),
                q_chunk=case.get("q_chunk"),
                seconds=seconds,
                peak_GB=peak / 1e9,
                tokens_per_s=B * T / seconds,
                loss=float(step.loss.detach()),
            )
        except torch.OutOfMemoryError:
            row(name, T=T, B=B, policy=case.get("attention_policy"), status="oom")
        step = None


RECOMPUTE = dict(kind="ours", attention_policy="recompute", position="none")


def train(row, quick, nanogpt=None):
    T = 2048 if quick else 65_536
    cases = [
        ("train nanoGPT", dict(kind="nanogpt", compiled=True)),
        ("train plain", dict(kind="ours", compiled=True)),
        ("train recompute", dict(RECOMPUTE)),
        ("train recompute checkpoint", dict(RECOMPUTE, checkpoint_layers=True)),
        ("train recompute offload", dict(RECOMPUTE, checkpoint_layers=True, offload=True)),
    ]
    train_rows(row, cases, T, 1, 3, nanogpt)


def million(row, quick, nanogpt=None):
    T = 4096 if quick else 1_048_576
    cases = [("train recompute checkpoint", dict(RECOMPUTE, checkpoint_layers=True))]
    train_rows(row, cases, T, 1, 1, nanogpt)


def short(row, quick, nanogpt=None):
    B = 2 if quick else 32
    cases = [
        ("short nanoGPT", dict(kind="nanogpt", compiled=True)),
        ("short plain", dict(kind="ours", compiled=True)),
        ("short recompute", dict(kind="ours", attention_policy="recompute", compiled=True)),
        (
            "short checkpoint",
            dict(kind="ours", attention_policy="recompute", checkpoint_layers=True),
        ),
    ]
    for _ in range(1 if quick else 2):  # twice round: the machine may drift
        train_rows(row, cases, 1024, B, 20, nanogpt)


SECTIONS = {"check": check, "prefill": prefill, "short": short, "train": train, "million": million}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sections", default="check,prefill,short,train,million")
    parser.add_argument("--nanogpt", help="path of nanoGPT's model.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--out", default=str(RESULTS / "attention_gpu.csv"))
    options = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    columns = (
        "T",
        "B",
        "policy",
        "q_chunk",
        "k_chunk",
        "seconds",
        "peak_GB",
        "tokens_per_s",
        "out_error",
        "lse_error",
        "grad_error",
        "loss",
    )
    where, running, out = provenance(DEVICE), None, Path(options.out)
    sections = options.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"unknown section {unknown.pop()!r}; choose from: {', '.join(SECTIONS)}")
    rows = [
        row for row in (read_csv(out) if out.exists() else []) if row["section"] not in sections
    ]

    def row(name, status="ok", **values):
        rows.append(
            {
                "section": running,
                "name": name,
                "status": status,
                **{column: values.get(column) for column in columns},
                **where,
            }
        )
        shown = " ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in values.items()
            if value is not None
        )
        print(f"{name:34s} {status} {shown}", flush=True)
        write_csv(out, rows)

    for running in sections:
        extra = (
            {} if running in ("check", "prefill") else {"nanogpt": load_nanogpt(options.nanogpt)}
        )
        SECTIONS[running](row, options.quick, **extra)


if __name__ == "__main__":
    main()
