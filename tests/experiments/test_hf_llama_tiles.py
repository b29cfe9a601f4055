"""The script that measures tiled Llamas, at a size of seconds."""

import sys

import pytest

from experiments.attention import hf_llama_tiles
from experiments.shared.common import read_csv


@pytest.mark.slow
def test_rows_tell_peaks_and_errors(tmp_path, monkeypatch):
    out = tmp_path / "rows.csv"
    flags = ["--length=512", "--layers=2", "--width=64", "--q_chunk=64", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["hf_llama_tiles", *flags])
    hf_llama_tiles.main()
    rows = {row["name"]: row for row in read_csv(out)}
    assert list(rows) == list(hf_llama_tiles.CONTESTANTS)
    assert rows["tiled"]["peak_MB"] < rows["checkpointed"]["peak_MB"] < rows["original"]["peak_MB"]
    for row in rows.values():
        assert row["out_error"] < 1e-5 and row["grad_error"] < 1e-5
