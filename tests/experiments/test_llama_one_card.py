"""The script of one card, at a size that a processor manages."""

import pytest

from experiments.scale import llama_one_card
from experiments.shared.common import read_csv
from leangpt.system.errors import UserError


@pytest.mark.slow
def test_a_tiny_case(tmp_path):
    out = tmp_path / "rows.csv"
    flags = ["--cases=tiny", "--device=cpu", "--steps=4", f"--folder={tmp_path}", f"--out={out}"]
    for _ in range(2):  # the second time the weights are there
        llama_one_card.main(flags)
    (row,) = read_csv(out)
    assert row["case"] == "tiny" and row["T"] == 64 and not row["outcome"]
    assert row["tokens_per_s"] > 0 and row["gpu_peak_gb"] >= 0 and row["host_peak_gb"] > 0.1
    assert 90_000 < row["parameters"] < 130_000 and row["loss"] > 0


def test_unknown_cases():
    with pytest.raises(UserError, match="unknown cases 9b"):
        llama_one_card.main(["--cases=9b"])
