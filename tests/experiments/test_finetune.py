"""Fine-tuning by sides, at a size that a processor manages."""

import pytest
from tiny_run import make_dataset

from experiments.scale import finetune
from experiments.shared.common import read_csv
from leangpt.system.errors import UserError
from leangpt.text.dataset import load_dataset
from leangpt.weights.export import export_pretrained
from model import GPT, GPTConfig


@pytest.mark.slow
def test_two_sides(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "rows.csv"
    make_dataset(data)
    vocab_size = load_dataset("tiny", data).vocab_size
    config = GPTConfig(
        block_size=16, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=16, position="rope",
        norm="rmsnorm", mlp="swiglu",
    )  # fmt: skip
    export_pretrained(GPT(config), tmp_path / "model")
    flags = [f"--model={tmp_path / 'model'}", f"--data_dir={data}", "--dataset=tiny"]
    flags += ["--other=tiny", "--sides=adamw_float32,muonsn4_2.6", "--rates=1e-3", "--seeds=2"]
    flags += ["--iterations=4", "--batch_size=4", "--block_size=16", "--device=cpu"]
    for _ in range(2):  # the second time all is there
        finetune.main([*flags, f"--out={out}"])
    rows = read_csv(out)
    assert [(row["side"], row["seed"]) for row in rows] == [
        ("adamw_float32", 1), ("adamw_float32", 2), ("muonsn4_2.6", 1), ("muonsn4_2.6", 2),
    ]  # fmt: skip
    assert all(row["forgotten"] < 0 for row in rows)  # the other text is the same one
    assert "2 seeds: loss" in capsys.readouterr().out


def test_a_best_rate_at_the_edge_asks_for_another():
    settings = finetune.Settings(rates="1e-3,2e-3")
    row = dict(side="adamsn8_3", iterations=200, dataset="new", seed=1)
    rows = [row | dict(learning_rate=rate, val_loss=3 - rate) for rate in (1e-3, 2e-3)]
    assert finetune.wanted(settings, "adamsn8_3", rows) == (4e-3, 1)
    rows.append(row | dict(learning_rate=4e-3, val_loss=5.0))
    assert finetune.wanted(settings, "adamsn8_3", rows) == (2e-3, 2)
    with pytest.raises(UserError, match="unknown sides"):
        finetune.Settings(sides="lora")
