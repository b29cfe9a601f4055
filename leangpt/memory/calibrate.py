"""This machine's rates, measured in seconds and kept: what makes predicted times absolute."""

import hashlib
import json
from dataclasses import asdict
from functools import partial

import torch
from torch.nn import functional as F

from leangpt.memory.speed import Rates
from leangpt.system.cache import cache_folder
from leangpt.system.timing import describe_machine, quartiles, timed
from leangpt.system.whole_files import write_whole

REPEATS = 5  # the median counts


def rates_file(device: torch.device, dtype: torch.dtype):
    """Where the rates of this machine are kept -> Path."""
    key = f"{describe_machine(device)} {torch.__version__} {dtype} {torch.get_num_threads()}"
    return cache_folder() / f"rates-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def known_rates(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """What `calibrate` measured here before; None: nothing, or a file that is none of its."""
    try:
        return Rates(**json.loads(rates_file(device, dtype).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def calibrate(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure products, attention, bandwidth, the way to the host and launches, and keep them."""
    cuda = device.type == "cuda"
    n = 4096 if cuda else 768
    a = torch.randn(n, n, device=device, dtype=dtype)
    products = 2 * n**3 / seconds(lambda: a @ a, device)
    T, H, D = (4096, 16, 64) if cuda else (1024, 4, 64)
    q = torch.randn(1, H, T, D, device=device, dtype=dtype)
    attend = partial(F.scaled_dot_product_attention, q, q, q, is_causal=True)
    attention = 2 * T * T * H * D / seconds(attend, device)
    many = torch.empty(1 << (28 if cuda else 25), device=device, dtype=torch.float32)
    bandwidth = 2 * many.numel() * 4 / seconds(lambda: many.add_(1), device)
    host = bandwidth
    if cuda:
        pinned = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(pinned, device=device)
        host = pinned.numel() / seconds(lambda: there.copy_(pinned, non_blocking=True), device)
    small = torch.zeros(8, device=device)

    def launches():
        for _ in range(100):
            small.add_(1)

    rates = Rates(products, attention, bandwidth, host, seconds(launches, device) / 100, True)
    path = rates_file(device, dtype)
    write_whole(path, json.dumps(asdict(rates), indent=1).encode())
    return rates


def seconds(work, device) -> float:
    """Median time of `work`, after one call that does not count."""
    work()
    return quartiles([timed(work, device) for _ in range(REPEATS)])[0]
