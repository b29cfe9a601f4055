"""bench.py as a user runs it."""

import csv
import io
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import ROOT

import bench
from leangpt.system.errors import RunError, UserError

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


@pytest.mark.slow
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


@pytest.mark.slow
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
        (["--heads=7"], "heads=7 does not divide d_model=256"),
        (["--kv-heads=3"], "kv_heads=3 does not divide"),
        (["--seq=64,0"], "--seq must be positive, not 0"),
        (["--seq="], "--seq is empty"),
        (["--policy="], "--policy is empty"),
        (["--csv="], "--csv is empty"),
        (["--d-model=100", "--heads=10"], "int4 packs 32 weights.*d_model=100: give --policy"),
        (["--n_embd=100", "--heads=10"], "int4 packs 32 weights.* n_embd=100: give --policy"),
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


@pytest.mark.slow
def test_a_bad_setting_exits_with_2_and_one_line():
    done = run_bench("--policy=lain")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown policy") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_cells_that_cannot_finish_become_rows():
    slow = bench.run_in_process(TINY, timeout=0.01)
    assert slow["status"] == "timeout" and slow["seq"] == 64 and slow["time_s"] == ""
    huge = bench.run_in_process(TINY | {"seq": 10**12}, timeout=60)
    assert huge["status"] == "oom" and "allocate" in huge["message"]
    broken = bench.run_in_process(TINY | {"device": "meta"}, timeout=60)
    assert broken["status"] == "error" and broken["message"]
    for row in (slow, huge, broken):
        assert set(row) == set(bench.COLUMNS)


def test_a_sweep_with_cells_that_failed_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--seq=16,32", "--policy=plain", "--device=cpu"])
    for status, failed in (("ok", False), ("oom", False), ("error", True)):
        row = dict.fromkeys(bench.COLUMNS, "") | {"status": status}
        monkeypatch.setattr(bench, "run_in_process", lambda cell, timeout: row)  # noqa: B023
        with pytest.raises(RunError, match="2 of 2 cells") if failed else nullcontext():
            bench.main()
        assert len(capsys.readouterr().out.splitlines()) == 3  # all of it is shown


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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_is_named_before_anything_is_measured():
    done = run_bench("--seq=16", "--runs=1", "--csv=/dev/full", "--device=cpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: cannot write /dev/full: No space left on device\n"


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error():
    words = f"{sys.executable} {bench.__file__} --device=cpu --seq=16 --runs=1 --print"
    command = ["bash", "-c", f"set -o pipefail; {words} | head -1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "") and done.stdout.startswith("seq,policy")
