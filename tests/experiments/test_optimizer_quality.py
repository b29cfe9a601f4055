"""The comparison of optimizers: what it runs, that runs do not mix, and its statistics."""

import math
from dataclasses import replace

import pytest
import torch

from experiments.optimizers.many_runs import (
    Cohort,
    Run,
    Setup,
    Text,
    data_order,
    read_text,
    schedule,
    train_runs,
)
from experiments.optimizers.optimizer_quality import Settings, next_runs, summarise
from experiments.optimizers.optimizer_variants import (
    ABLATIONS,
    build,
    expand,
    missing_package,
    parse_options,
    state_of_one,
)
from experiments.optimizers.peers import PEERS
from experiments.optimizers.stacked_gpt import StackedGPT
from experiments.shared.paired import mean_interval, paired_difference, t_distribution
from leangpt.optim import build_optimizer
from leangpt.system.errors import UserError
from model import GPT

SETUP = Setup("tiny", dict(block_size=16, n_layer=2, n_head=2, n_embd=16), 4, 12, warmup=3)
VARIANTS = [
    "torch_adamw",
    "torch_nadam",
    "torch_muon",
    "torch_adafactor",
    "adamsn",
    "adafactor",
    "muonsn",
]


@pytest.fixture(scope="module")
def text():
    tokens = torch.randint(11, (600,), generator=torch.Generator().manual_seed(0))
    return Text(tokens[:500], tokens[500:], 11, "none")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_side_by_side_equal_runs_alone(variant, text):
    runs = [Run(variant, 4e-3, 8e-3, 1), Run(variant, 4e-3, 8e-3, 2), Run(variant, 8e-3, 4e-3, 1)]
    together = train_runs(SETUP, runs, text, build)
    alone = [train_runs(SETUP, [run], text, build)[0] for run in sorted(runs)]
    for a, b in zip(together, alone, strict=True):
        assert abs(a["val_loss"] - b["val_loss"]) < 1e-4
        assert (a["seed"], a["learning_rate"]) == (b["seed"], b["learning_rate"])
    assert len({round(row["val_loss"], 5) for row in together}) == 3


@pytest.mark.parametrize("variant", PEERS)
def test_every_peer_trains_every_parameter(variant, text):
    if package := missing_package(variant):
        pytest.skip(f"{package} is not installed")
    stack = StackedGPT(SETUP.config(text.vocab_size), [1, 2], "cpu")
    for weight in stack.weights.values():
        weight.grad.normal_(std=1e-3)
    before = {name: weight.detach().clone() for name, weight in stack.weights.items()}
    setup = replace(SETUP, weight_decay=0.0)
    optimizers = PEERS[variant](Run(variant, 1e-2, 1e-2, 1), Cohort(stack, 0, 2), setup)
    for optimizer in optimizers:
        optimizer.step()
    for name, weight in stack.weights.items():
        assert (weight != before[name]).any(-1).all(), name


def test_a_run_is_an_ordinary_training_run(text):
    """One replica against a GPT trained by a plain loop."""
    (row,) = train_runs(SETUP, [Run("adamsn", 4e-3, 8e-3, 5)], text, build)
    torch.manual_seed(5)
    model = GPT(SETUP.config(text.vocab_size))
    optimizer = build_optimizer(
        model, "adamsn", learning_rate=4e-3, embedding_lr=8e-3, weight_decay=0.1, betas=(0.95, 0.99)
    )
    for iteration, starts in enumerate(data_order(SETUP, text, 5)):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(SETUP, iteration)
        x = torch.stack([text.train[s : s + 16] for s in starts.tolist()])
        y = torch.stack([text.train[s + 1 : s + 17] for s in starts.tolist()])
        model.zero_grad()
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    blocks = (len(text.val) - 1) // 16
    x = text.val[: blocks * 16].view(blocks, 16)
    y = text.val[1 : blocks * 16 + 1].view(blocks, 16)
    assert abs(model(x, y)[1].item() - row["val_loss"]) < 1e-4


def play(variant, settings, loss):
    """Follow next_runs to its end on a made-up loss(linear, embedding, seed) -> rows."""
    rows = []
    while runs := next_runs(variant, rows, settings):
        rows += [
            dict(
                variant=variant,
                learning_rate=run.learning_rate,
                seed=run.seed,
                embedding_lr=run.embedding_lr,
                best_val_loss=loss(run.learning_rate, run.embedding_lr, run.seed),
            )
            for run in runs
        ]
        assert len(rows) < 500
    return rows


def test_grid_climbs_until_the_best_is_inside_then_confirms():
    def bowl(linear, embedding, seed):  # its bottom lies outside the grid in both rates
        return abs(math.log2(linear / 3.2e-2)) + abs(math.log2(embedding / 2e-3)) + 1e-3 * seed

    rows = play("adamsn", Settings(), bowl)
    fresh = [row for row in rows if row["seed"] > 1000]
    assert sorted(row["seed"] for row in fresh) == [1001, 1002, 1003, 1004, 1005]
    assert {(row["learning_rate"], row["embedding_lr"]) for row in fresh} == {(3.2e-2, 2e-3)}
    assert len({(r["learning_rate"], r["embedding_lr"]) for r in rows}) >= 12 + 4


def test_diverged_runs_never_win():
    def edge(linear, embedding, seed):
        return math.nan if linear > 5e-3 else 1 - linear

    fresh = [row for row in play("adamsn", Settings(), edge) if row["seed"] > 1000]
    assert {row["learning_rate"] for row in fresh} == {4e-3}


@pytest.mark.slow
def test_every_ablation_can_be_built(text):
    for variant in expand(",".join(["ours", *ABLATIONS])):
        run = Run(variant, 4e-3, 8e-3, 1)
        (row,) = train_runs(replace(SETUP, iterations=1, warmup=1), [run], text, build)
        assert math.isfinite(row["val_loss"]), variant


def test_finished_runs_are_not_run_again():
    settings = Settings(
        linear_lrs="1e-3", embedding_lrs="1e-3", climb=False, grid_seeds=1, confirm_seeds=2
    )
    rows = play("adamsn", settings, lambda *_: 1.0)
    assert [row["seed"] for row in rows] == [1001, 1002]  # one point: nothing to choose from
    runs = next_runs("adamsn", rows[:-1], settings)
    assert [(run.seed, run.learning_rate) for run in runs] == [(1002, 1e-3)]


def test_summary_pairs_by_seed():
    def row(variant, seed, loss):
        return dict(
            setup="seed",
            iterations=1,
            variant=variant,
            learning_rate=1.0,
            embedding_lr=1.0,
            seed=seed,
            best_val_loss=loss,
            state_bytes=8,
            parameters=2,
        )

    rows = [
        row("torch_adamw", 1001, 2.0),
        row("torch_adamw", 1002, 3.0),
        row("adamsn", 1002, 2.5),
        row("adamsn", 1001, 1.6),
        row("adamsn", 1, 0.0),
    ]
    best, reference = summarise(rows)
    assert best["variant"] == "adamsn" and best["val_loss"] == 2.05
    assert best["to_adamw"] == -0.45 and best["state_percent"] == 50.0
    assert reference["to_adamw"] == 0 and reference["p"] == 1
    other = [{**row("adamsn", seed, 9.0), "learning_rate": 1.0} for seed in (1001, 1002, 1003)]
    worst = summarise([*rows, *other])[1]  # one setting's seeds, never two settings' under one name
    assert (worst["learning_rate"], worst["val_loss"], worst["seeds"]) == (1.0, 9.0, 3)


def test_student_t():
    assert abs(t_distribution(2.776445, 4) - 0.975) < 1e-6
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and abs(half - 2.776445 * math.sqrt(2.5 / 5)) < 1e-4
    difference, _, p = paired_difference([1.0, 2.0, 3.1], [1.5, 2.4, 3.7])
    assert abs(difference + 0.5) < 1e-12 and abs(p - 0.0130725) < 1e-6


def test_state_is_one_models():
    tokens = torch.randint(11, (600,))
    text = Text(tokens[:500], tokens[500:], 11, "none")
    adam = state_of_one("torch_adamw", SETUP, text, "cpu")
    matrices = 8 * adam["parameters"]
    assert matrices < adam["state_bytes"] < matrices + 8 * 30  # and a step count each
    assert state_of_one("muonsn", SETUP, text, "cpu")["state_bytes"] < 0.7 * matrices


def test_variants_and_texts_that_do_not_exist(tmp_path):
    with pytest.raises(UserError, match="unknown variant 'adamsm'"):
        expand("adamsm")
    with pytest.raises(UserError, match="not key=value"):
        parse_options("adamsn:norm")
    assert expand("adamsn:betas=(0.9,0.95),adam") == ["adamsn:betas=(0.9,0.95)", "adam"]
    assert parse_options("adamsn:norm=sum+momentum_bits=8") == (
        "adamsn",
        dict(norm="sum", momentum_bits=8),
    )
    with pytest.raises(UserError, match="no file or folder"):
        read_text(tmp_path / "nothing.txt", 16)
    (tmp_path / "short.txt").write_text("to be")
    with pytest.raises(UserError, match="too short"):
        read_text(tmp_path / "short.txt", 16)
