"""bench.py as a user runs it, and the reference its errors are measured against."""

import csv
import io
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import bench
from experiments.attention import attention_scaling
from experiments.shared.common import interleaved, read_csv, write_csv
from leangpt.memory.plan import predict_block_peak
from leangpt.system import timing
from leangpt.system.errors import UserError
from leangpt.system.timing import (
    block_config,
    block_peak,
    build_block,
    forward,
    forward_error,
    is_out_of_memory,
    max_relative_error,
    quartiles,
    random_input,
    reference_rows,
)

SEED_COLUMNS = [
    "seq",
    "policy",
    "k_chunk",
    "q_chunk",
    "kv_heads",
    "time_s",
    "peak_cuda_MB",
    "delta_rss_MB",
    "out_shape",
]
TINY = {
    "seq": 64,
    "policy": "cache",
    "q_chunk": None,
    "k_chunk": None,
    "runs": 1,
    "batch": 1,
    "d_model": 32,
    "heads": 4,
    "kv_heads": None,
    "dtype": "float32",
    "seed": 1,
    "device": "cpu",
}


def run_bench(*arguments):
    return subprocess.run(
        [sys.executable, "bench.py", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )


def test_the_default_grid_gives_a_row_a_policy_in_the_known_columns(tmp_path):
    path = tmp_path / "bench.csv"
    done = run_bench(
        "--seq",
        "48",
        "--runs=2",
        "--d-model=32",
        "--heads=4",
        "--print",
        f"--csv={path}",
        "--device=cpu",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == path.read_text()
    table = list(csv.reader(io.StringIO(done.stdout)))
    assert table[0][:9] == SEED_COLUMNS
    rows = [dict(zip(table[0], line)) for line in table[1:]]
    assert [row["policy"] for row in rows] == ["cache", "grouped", "recompute", "int4"]
    for row in rows:
        assert row["status"] == "ok", row
        assert row["out_shape"] == "(1, 48, 32)"
        assert float(row["time_s"]) > 0 and float(row["peak_MB"]) > 0
        assert row["peak_cuda_MB"] == "" and row["device"] == "cpu"
        assert row["kv_heads"] == ("2" if row["policy"] == "grouped" else "4")
    for row in rows[:3]:
        assert float(row["max_rel_err"]) < 1e-6
        assert float(row["predicted_MB"]) > 0
    assert rows[3]["predicted_MB"] == ""
    assert 1e-3 < float(rows[3]["max_rel_err"]) < 0.3  # four bits are not exact, nor useless
    assert float(rows[3]["weights_MB"]) < 0.3 * float(rows[0]["weights_MB"])


def test_one_cell_without_flags_is_a_readable_table(monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "bench.py",
            "--seq=32",
            "--runs=1",
            "--d-model=32",
            "--heads=4",
            "--policy=recompute",
            "--q-chunk=16",
            "--k-chunk=8",
            "--device=cpu",
        ],
    )
    bench.main()
    printed = capsys.readouterr()
    heading, line = printed.out.splitlines()
    assert dict(zip(heading.split(), line.split()))["k_chunk"] == "8"
    assert printed.err == ""  # no progress bar where there is no terminal


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--policy=lain"], "unknown policy 'lain'"),
        (["--heads=7"], "n_head=7 does not divide n_embd=256"),
        (["--kv-heads=3"], "n_kv_head=3 does not divide"),
        (["--seq=64,0"], "--seq must be positive, not 0"),
        (["--seq="], "--seq is empty"),
        (["--policy="], "--policy is empty"),
        (["--runs=0"], "--runs must be positive"),
        (["--q-chunk=0"], "q_chunk must be positive"),
        (["--dtype=float8"], "unknown dtype 'float8'"),
        (["--device=tpu"], "unknown device 'tpu'"),
        (["--seqs=4"], "did you mean"),
        (["--csv=/nowhere/at/all.csv"], "--csv=/nowhere/at/all.csv: No such file"),
        (["--csv=/"], "--csv=/: Is a directory"),
    ],
)
def test_bad_settings_are_told_before_anything_runs(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(UserError, match=message):
        bench.main()
    assert capsys.readouterr().out == ""


def test_a_bad_setting_exits_with_2_and_one_line():
    done = run_bench("--policy=lain")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown policy") and done.stderr.count("\n") == 1


def test_cells_that_cannot_finish_become_rows():
    slow = bench.run_in_process(TINY, timeout=0.01)
    assert slow["status"] == "timeout" and slow["seq"] == 64 and slow["time_s"] == ""
    huge = bench.run_in_process(TINY | {"seq": 10**12}, timeout=60)
    assert huge["status"] == "oom" and "allocate" in huge["message"]
    broken = bench.run_in_process(TINY | {"device": "meta"}, timeout=60)
    assert broken["status"] == "error" and broken["message"]
    for row in (slow, huge, broken):
        assert set(row) == set(bench.COLUMNS)


def test_the_grid_leaves_out_what_would_run_twice():
    settings = bench.Settings(
        seq=(64,), policy=("plain", "cache", "recompute"), q_chunk=(16, 32), device="cpu"
    )
    cells = bench.grid(settings)
    assert [(cell["policy"], cell["q_chunk"]) for cell in cells] == [
        ("plain", 16),
        ("cache", 16),
        ("cache", 32),
        ("recompute", 16),
        ("recompute", 32),
    ]


def test_the_reference_is_attention_written_out_by_hand():
    """Against loops over heads and rows, with 2 key/value heads for 4 query heads."""
    config = block_config("grouped", 6, n_embd=8, n_head=4)
    block, _ = build_block(config, dtype=torch.float64)
    x = random_input(config, 1, 6, dtype=torch.float64)
    with torch.no_grad():
        h = block.ln_1(x)[0]  # (T, C)
        q, k, v = block.attn.c_attn(h).split((8, 4, 4), dim=-1)
        y = torch.zeros(6, 8, dtype=torch.float64)
        for head in range(4):
            own, shared = slice(2 * head, 2 * head + 2), slice(head // 2 * 2, head // 2 * 2 + 2)
            for t in range(6):
                scores = [math.exp(q[t, own] @ k[s, shared] / math.sqrt(2)) for s in range(t + 1)]
                y[t, own] = sum(w * v[s, shared] for s, w in enumerate(scores)) / sum(scores)
        x2 = x[0] + block.attn.c_proj(y)
        expected = x2 + block.mlp(block.ln_2(x2))
    rows = torch.tensor([5, 0, 3])
    assert max_relative_error(reference_rows(block, x, rows)[0], expected[rows]) < 1e-14


@pytest.mark.parametrize("policy", ["plain", "cache", "grouped", "recompute"])
def test_every_policy_agrees_with_the_reference_and_a_wrong_block_does_not(policy):
    config = block_config(policy, 100, 32, 4, q_chunk=16, k_chunk=24)
    block, exact = build_block(config)
    x = random_input(config, 2, 100)
    assert forward_error(block, exact, x) < 1e-6
    other, _ = build_block(config, seed=7)
    assert forward_error(other, exact, x) > 1e-2
    with torch.no_grad():
        other.load_state_dict(exact.state_dict())
        other.attn.c_attn.weight[0] *= 1.01  # one row of one head's queries, by one per cent
    assert forward_error(other, exact, x) > 1e-5


def test_long_sequences_are_compared_on_a_sample_and_huge_ones_not_at_all(monkeypatch):
    config = block_config("plain", 5000, 8, 2)
    block, exact = build_block(config)
    assert forward_error(block, exact, random_input(config, 1, 5000)) < 1e-5
    monkeypatch.setattr("leangpt.system.timing.REFERENCE_BYTES", 1000)
    assert forward_error(block, exact, random_input(config, 1, 5000)) is None


def test_recompute_needs_no_more_memory_for_a_longer_sequence():
    """What a pass without gradients allocates beyond its input does not depend on T."""

    def peak(policy, T):
        config = block_config(policy, T, 64, 4, q_chunk=64, k_chunk=64)
        block, _ = build_block(config)
        x = random_input(config, 1, T)
        return block_peak(lambda: forward(block, x), block, x)

    assert peak("recompute", 2048) < 1.05 * peak("recompute", 1024)
    assert peak("recompute", 2048) < 0.03 * peak("plain", 2048)
    stream = 1024 * 64 * 4
    assert abs(peak("cache", 2048) - peak("cache", 1024) - 2 * stream) < 0.02 * stream  # K and V
    assert abs(peak("grouped", 2048) - peak("grouped", 1024) - stream) < 0.02 * stream


@pytest.mark.parametrize("policy", ["plain", "cache", "grouped", "recompute"])
@pytest.mark.parametrize("B, T", [(1, 4096), (2, 2048)])
def test_the_peak_of_a_block_is_what_the_formula_says(policy, B, T):
    config = block_config(policy, T, 256, 8, q_chunk=512, k_chunk=512)
    block, _ = build_block(config)
    x = random_input(config, B, T)
    peak = block_peak(lambda: forward(block, x), block, x)
    assert 0.97 < predict_block_peak(config, B, T) / peak < 1.1


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


def test_the_commit_is_what_the_environment_says_or_else_git(monkeypatch, tmp_path, repository):
    monkeypatch.delenv("LEANGPT_COMMIT", raising=False)
    commit = timing.commit_id.__wrapped__  # what a run's first call found is cached
    monkeypatch.setattr(timing, "__file__", str(repository / "leangpt/system/timing.py"))
    clean = commit()
    assert len(clean) >= 4 and int(clean, 16) >= 0
    (repository / "code.py").write_text("edited\n")
    assert commit() == clean + "+"
    monkeypatch.setenv("LEANGPT_COMMIT", "given")  # a copy may lie in some other repository
    assert commit() == "given"
    monkeypatch.delenv("LEANGPT_COMMIT")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "copy").mkdir()  # the files without their repository
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "copy" / "leangpt/system/timing.py"))
    assert commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))  # nor is there a git
    assert commit() == ""


def test_small_helpers(tmp_path):
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0)
    calls = []
    found = interleaved([lambda: calls.append("a") or 1, lambda: calls.append("b") or 2], 2)
    assert calls == ["a", "b", "a", "b"] and found == [[1, 1], [2, 2]]
    rows = [{"name": "a, b", "n": 3, "x": 0.5, "nothing": "", "commit": "12e4567"}]
    write_csv(tmp_path / "t.csv", rows)
    assert read_csv(tmp_path / "t.csv") == [rows[0] | {"nothing": None}]
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
