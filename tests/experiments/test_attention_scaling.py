"""attention_scaling.py at sizes of a moment, and what the scripts share."""

import subprocess
import sys

import pytest
from conftest import ROOT

from experiments.attention import attention_scaling
from experiments.shared.common import interleaved, read_csv, write_csv


@pytest.mark.slow
def test_attention_scaling_writes_its_files(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.attention.attention_scaling",
            "--seq=128,256",
            "--long_seq=512",
            "--q_chunk=32",
            "--k_chunk=32",
            "--backward_chunk=32",
            "--d_model=32",
            "--heads=4",
            "--runs=2",
            "--sweep_seq=128",
            "--sweep_chunk=16,64",
            "--default_seq=64,128",
            f"--out_dir={tmp_path}",
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "attention_scaling.csv")
    for row in rows:
        assert (row["predicted_MB"] is None) == (row["mode"] == "forward+backward")
        if row["mode"] == "forward":
            # for blocks so small the fused kernel's workspace is overestimated
            assert 0.8 * row["peak_MB"] < row["predicted_MB"] < 1.2 * row["peak_MB"] + 0.15
    assert len(rows) == 2 * (4 + 5) + 1  # checkpoint joins for backward
    assert all(row["max_rel_err"] < 1e-6 for row in rows)
    assert all(row["grad_rel_err"] < 1e-5 for row in rows if row["mode"] == "forward+backward")
    slopes = {
        (fit["policy"], fit["mode"]): fit["slope_streams"]
        for fit in read_csv(tmp_path / "attention_scaling_fit.csv")
    }
    assert abs(slopes["recompute", "forward"]) < 0.01
    assert abs(slopes["cache", "forward"] - 2) < 0.01
    assert slopes["recompute", "forward+backward"] < slopes["plain", "forward+backward"] / 2
    chunks = read_csv(tmp_path / "attention_chunks.csv")
    assert [row["q_chunk"] for row in chunks] == [None, 16, 64]
    defaults = read_csv(tmp_path / "attention_defaults.csv")
    assert [(row["seq"], row["policy"], row["mode"]) for row in defaults] == [
        (T, policy, mode)
        for T in (64, 128)
        for mode in attention_scaling.MODES
        for policy in ("plain", "recompute")
    ]


def test_the_fit_recovers_a_line():
    rows = [
        {
            "policy": "cache",
            "mode": "forward",
            "seq": T,
            "q_chunk": "",
            "d_model": 32,
            "peak_bytes": 1000 + 3 * 32 * 4 * T,
            "machine": "",
            "torch": "",
            "commit": "",
        }
        for T in (100, 300, 1000)
    ]
    (fit,) = attention_scaling.fit_peaks(rows)
    assert fit["slope_streams"] == 3 and fit["worst_residual"] == 0
    assert fit["intercept_MB"] == round(1000 / 2**20, 3)


def test_small_helpers(tmp_path):
    calls = []
    found = interleaved([lambda: calls.append("a") or 1, lambda: calls.append("b") or 2], 2)
    assert calls == ["a", "b", "a", "b"] and found == [[1, 1], [2, 2]]
    rows = [{"name": "a, b", "n": 3, "x": 0.5, "nothing": "", "commit": "12e4567"}]
    write_csv(tmp_path / "t.csv", rows)
    assert read_csv(tmp_path / "t.csv") == [rows[0] | {"nothing": None}]
