"""generation_quality.py on a tiny model: every rounding is measured, the exact is 0."""

import pytest
import torch

from experiments.decoding.generation_quality import measure, replace, windows
from experiments.shared.common import read_csv, write_csv
from leangpt.system.errors import UserError
from model import GPT, GPTConfig


@pytest.mark.slow
def test_every_rounding_is_measured():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=48, vocab_size=65, n_layer=2, n_head=2, n_embd=64)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    batches = windows(torch.randint(65, (200,)).tolist(), 3, 40)
    # 128 does not divide 64
    rows = measure("tiny", model, batches, 20, seeds=2, groups=(32, 128), tune=20)
    found = {(row["what"], row["rule"], row["bits"], row["seed"]): row for row in rows}
    for what in ("weights", "kv cache"):
        exact = found[what, "exact", 32, ""]
        assert exact["change"] == 0 and abs(exact["divergence"]) < 1e-6
    rounded = [
        found["weights", rule, 5.0, seed]["divergence"]
        for rule, seed in (
            ("minimum and maximum", ""),
            ("clipping range", ""),
            ("calibrated", 0),
            ("calibrated", 1),
        )
    ]
    assert max(rounded[2:]) < min(rounded[:2]) < 0.5
    fitted = [found["weights", "calibrated, fitted", 5.0, seed]["divergence"] for seed in (0, 1)]
    assert max(fitted) < min(rounded[:2])
    eight, four = (found["kv cache", "minimum and maximum", bits, ""] for bits in (8, 4))
    assert 0 < eight["divergence"] < four["divergence"] and four["group"] == 16


def test_windows_follow_one_another():
    ((x, y),) = windows(list(range(100)), 2, 10)
    assert x.tolist() == [list(range(10)), list(range(10, 20))] and torch.equal(y, x + 1)
    with pytest.raises(UserError, match="100 tokens"):
        windows(list(range(100)), 10, 10)


def test_the_other_models_rows_stay(tmp_path):
    path = tmp_path / "q.csv"
    write_csv(path, [dict(what="weights", loss=1.5, commit="old")])  # of before there were two
    for model, loss in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        replace(path, [dict(model=model, loss=loss)], dict(commit="new"))
    assert read_csv(path) == [
        dict(model="b", loss=2, commit="new"),
        dict(model="a", loss=3, commit="new"),
    ]
