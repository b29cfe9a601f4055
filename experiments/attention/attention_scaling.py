"""Time and peak memory of one block against sequence length, for every attention policy.

  python -m experiments.attention.attention_scaling   about 20 minutes on 2 cores; keep them quiet

Writes results/attention_scaling.csv, a row for each length, policy and mode, and
results/attention_scaling_fit.csv, the straight line through each policy's peaks: its slope, in
units of one residual stream (T C 4 bytes), is what a policy costs per token. The third file,
results/attention_chunks.csv, is `recompute` at one length with tiles of every size: what less
memory costs in time. The fourth, results/attention_defaults.csv, is `recompute` with tiles of its
own choosing, as a user gets it who sets no size; --part=defaults runs that alone (two minutes).

Every contestant runs once a round, rounds are interleaved, a row is the median of its rounds.
`forward` is a pass without gradients, where tiles overwrite the residual stream as they do in a
model; `forward+backward` ends with the gradients of x and of every weight, which count.
predicted_MB is leangpt/memory/tiles.py's formula for the same peak.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import parse_config
from experiments.shared.common import RESULTS, interleaved, provenance, write_csv
from leangpt.attention.tile_sizes import tile_sizes
from leangpt.memory.block_cell import (
    block_arguments,
    block_peak,
    build_block,
    forward,
    forward_backward,
    forward_error,
    max_relative_error,
    random_input,
)
from leangpt.memory.tiles import predict_block_peak
from leangpt.system.errors import UserError, exit_cleanly
from leangpt.system.timing import MIB, quartiles, timed
from model import Block, GPTConfig

MODES = ("forward", "forward+backward")
BACKWARD_UP_TO = 16384  # longest length of forward+backward: twice as long takes four times as long
GRADIENTS_UP_TO = 8192  # longest length whose gradients are compared, in float64: 3 times the time


@dataclass
class Settings:
    seq: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)  # lengths for every policy
    long_seq: tuple[int, ...] = (131072,)  # lengths for recompute alone, forward, one round
    policy: tuple[str, ...] = ("plain", "cache", "grouped", "recompute")  # contestants
    q_chunk: int = 4096  # rows per tile without gradients, for every policy but plain
    k_chunk: int = 2048  # key/value rows per tile
    backward_chunk: int = 1024  # rows of both while training
    d_model: int = 256  # width of the residual stream, C
    heads: int = 8  # attention heads, H
    runs: int = 3  # interleaved rounds
    part: str = "all"  # all | defaults
    sweep_seq: int = 16384  # length at which recompute's tile size is swept
    sweep_chunk: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)  # q_chunk = k_chunk
    default_seq: tuple[int, ...] = (1024, 2048, 4096, 6144, 6272, 8192)  # tiles of its own choice
    out_dir: str = str(RESULTS)  # folder of the CSV files


def main():
    settings, _ = parse_config(Settings)
    if settings.part not in ("all", "defaults"):
        raise UserError(f"part must be all or defaults, not {settings.part!r}")
    if settings.part == "all":
        scaling(settings, Path(settings.out_dir))
    rows = []
    for T in settings.default_seq:
        for mode in MODES:
            configs = {
                policy: GPTConfig(**block_arguments(policy, T, settings.d_model, settings.heads))
                for policy in ("plain", "recompute")
            }
            rows += race(
                settings,
                [Contestant(policy, config, T, mode) for policy, config in configs.items()],
            )
    write_csv(Path(settings.out_dir) / "attention_defaults.csv", rows)


def scaling(settings, out_dir):
    """The first three files."""
    rows = []
    for T in settings.seq + settings.long_seq:
        policies = settings.policy if T in settings.seq else ("recompute",)
        for mode in MODES:
            if mode == "forward" or (T <= BACKWARD_UP_TO and T in settings.seq):
                chunk = None if mode == "forward" else settings.backward_chunk
                contestants = [contestant(settings, policy, T, mode, chunk) for policy in policies]
                if chunk:  # keeping a layer's input alone is a matter of training only
                    contestants.append(contestant(settings, "checkpoint", T, mode, chunk))
                rows += race(settings, contestants)
                write_csv(out_dir / "attention_scaling.csv", rows)  # a run cut short keeps its rows
    write_csv(out_dir / "attention_scaling_fit.csv", fit_peaks(rows))
    contestants = [contestant(settings, "plain", settings.sweep_seq, "forward")]
    contestants += [
        contestant(settings, "recompute", settings.sweep_seq, "forward", chunk)
        for chunk in settings.sweep_chunk
    ]
    write_csv(out_dir / "attention_chunks.csv", race(settings, contestants))


def contestant(settings, policy, T, mode, chunk=None):
    chunks = chunk or settings.q_chunk, chunk or settings.k_chunk
    arguments = block_arguments(policy, T, settings.d_model, settings.heads, None, *chunks)
    return Contestant(policy, GPTConfig(**arguments), T, mode)


def race(settings, contestants):
    """Rows of some contestants of one length and mode; times are compared to a first `plain`."""
    peaks = [each.peak() for each in contestants]  # and the warm-up
    runs = 1 if contestants[0].T in settings.long_seq else settings.runs
    seconds = interleaved([each.seconds for each in contestants], runs)
    rows = []
    for each, peak, times in zip(contestants, peaks, seconds):
        median, iqr = quartiles(times)
        ratio = ""
        if contestants[0].policy == "plain":  # by round: what slowed a round slowed both sides
            ratio = round(quartiles([a / b for a, b in zip(times, seconds[0])])[0], 4)
        errors = each.errors(compare_gradients=each.T <= GRADIENTS_UP_TO)
        row = {
            "seq": each.T,
            "policy": each.policy,
            "mode": each.mode,
            "q_chunk": each.q_chunk,
            "k_chunk": each.k_chunk,
            "kv_heads": each.config.kv_heads,
            "time_s": round(median, 6),
            "iqr_s": round(iqr, 6),
            "time_vs_plain": ratio,
            "runs": runs,
            "peak_bytes": peak,
            "peak_MB": round(peak / MIB, 3),
            "predicted_MB": each.predicted_MB(),
            **errors,
            "batch": 1,
            "d_model": settings.d_model,
            "heads": settings.heads,
            "device": "cpu",
            "dtype": "float32",
            **provenance(),
        }
        rows.append(row)
        print(
            f"T={each.T:<7} {each.mode:<17} {each.policy:<10} {each.q_chunk!s:<5} "
            f"{median:9.3f} s ± {iqr:.3f} {row['peak_MB']:9.1f} MB  "
            f"error {errors['max_rel_err']}",
            flush=True,
        )
    return rows


class Contestant:
    """A block and its input, in one mode."""

    def __init__(self, policy, config, T, mode):
        self.policy, self.config, self.T, self.mode = policy, config, T, mode
        self.block = build_block(Block, config)
        self.x = self.fresh_input()
        with torch.set_grad_enabled(mode != "forward"):
            self.q_chunk, self.k_chunk = tile_sizes(config, T, "cpu") or ("", "")

    def fresh_input(self):
        x = random_input(self.config, 1, self.T)
        return x.requires_grad_(self.mode == "forward+backward")

    def run(self):
        if self.mode == "forward":
            return forward(self.block, self.x)
        return forward_backward(self.block, self.x)

    def peak(self):
        return block_peak(self.run, self.block, self.x)

    def predicted_MB(self):
        """What the formula says of the peak; '' for training, where it is of whole models only."""
        if self.mode != "forward":
            return ""
        return round(predict_block_peak(self.config, 1, self.T) / MIB, 3)

    def seconds(self):
        self.x = None  # a pass may have written over it, and two of them need not exist
        self.x = self.fresh_input()
        return timed(self.run)

    def errors(self, compare_gradients):
        """max_rel_err of the output, grad_rel_err of the worst gradient, '' where not compared."""
        self.x = None
        error = forward_error(self.block, self.block, random_input(self.config, 1, self.T))
        errors = {"max_rel_err": "" if error is None else float(f"{error:.3g}"), "grad_rel_err": ""}
        if self.mode == "forward+backward" and compare_gradients:
            worst = gradient_error(self.block, self.config, self.T)
            errors["grad_rel_err"] = float(f"{worst:.3g}")
        return errors


def gradient_error(block, config, T):
    """Worst relative error among the gradients of x and the weights, against float64 and no tiles.

    The float64 block is the plain one, whose forward is itself held against the written-out
    softmax (tests/memory/test_block_cell.py).
    """
    exact = build_block(Block, config, dtype=torch.float64)
    exact.load_state_dict(block.state_dict())
    x = random_input(config, 1, T).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    forward_backward(block, x)
    out = exact.plain(x64)
    out.backward(torch.ones_like(out))
    pairs = [(x.grad, x64.grad)] + [
        (p.grad, q.grad) for p, q in zip(block.parameters(), exact.parameters())
    ]
    return max(max_relative_error(grad, reference) for grad, reference in pairs)


def fit_peaks(rows):
    """Least-squares line peak = intercept + slope T for each policy and mode.

    Lengths of at least four tiles only: shorter ones have fewer rows in flight than a tile.
    """
    fits = []
    for mode in MODES:
        for policy in dict.fromkeys(row["policy"] for row in rows):
            points = [
                row
                for row in rows
                if row["policy"] == policy
                and row["mode"] == mode
                and row["seq"] >= 4 * (row["q_chunk"] or 0)
            ]
            if len(points) < 2:
                continue
            T = torch.tensor([row["seq"] for row in points], dtype=torch.float64)
            peak = torch.tensor([row["peak_bytes"] for row in points], dtype=torch.float64)
            slope = ((T - T.mean()) * (peak - peak.mean())).sum() / (T - T.mean()).square().sum()
            intercept = peak.mean() - slope * T.mean()
            residual = (peak - intercept - slope * T).abs() / peak
            stream = points[0]["d_model"] * 4  # bytes a token of one residual stream
            fits.append(
                {
                    "policy": policy,
                    "mode": mode,
                    "lengths": len(points),
                    "shortest": int(T.min()),
                    "longest": int(T.max()),
                    "slope_streams": round((slope / stream).item(), 4),
                    "intercept_MB": round((intercept / MIB).item(), 3),
                    "worst_residual": round(residual.max().item(), 4),
                    **{name: points[0][name] for name in ("machine", "torch", "commit")},
                }
            )
    return fits


if __name__ == "__main__":
    exit_cleanly(main)
