"""experiments/plan/cards_check.py: plans of the table, trained; here at a tiny size on a CPU."""

from experiments.plan import cards_check
from experiments.shared.common import read_csv

FLAGS = "--batch_size=1 --gradient_accumulation_steps=1 --block_size=32"
TINY = dict(n_layer=2, n_head=2, n_embd=32, n_inner=None, n_kv_head=None, vocab_size=256)


def test_the_smallest_card_with_a_plan_is_checked():
    rows = [
        {"model": "GPT-2 124M", "card_GB": card, "flags": flags, "longest_flags": FLAGS}
        for card, flags in ((8, None), (12, "a"), (16, "b"))
    ]
    found = cards_check.checks(rows, ["GPT-2 124M"])
    assert [(goal, row["card_GB"]) for _, goal, row in found] == [("fastest", 12), ("longest", 8)]


def test_a_plan_is_trained(monkeypatch, tmp_path):
    monkeypatch.setitem(cards_check.LADDERS["gpt2"], "124M", TINY)
    row = {"card_GB": 8, "flags": FLAGS, "peak": 10**9}
    found = cards_check.run_check(("GPT-2 124M", "fastest", row), "cpu", tmp_path)
    assert found["outcome"] == "fits" and found["tokens_per_s"] > 0 and found["length"] == 32
    assert read_csv(cards_check.RESULTS / "plan_cards.csv")  # what it reads by itself
