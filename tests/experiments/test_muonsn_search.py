"""The bench for ideas must start from what MuonSN does, and every recipe must train."""

import math
from dataclasses import replace

import pytest
import torch

from experiments.optimizers.many_runs import Run, Setup, train_runs
from experiments.optimizers.optimizer_variants import build
from experiments.search.muonsn_recipes import recipes_named
from experiments.search.muonsn_search import Recipe, make, optimizers
from experiments.search.recipe_bench import run_batch
from leangpt.system.errors import UserError

SETUP = Setup("tiny", dict(block_size=16, n_layer=2, n_head=4, n_embd=32), 4, 8, warmup=3)


@pytest.mark.parametrize(
    "variant, overrides",
    [
        ("muonsn:nu=0.95+betas=(0.9,0.99)+column_norm=False", {}),
        (
            "muonsn:momentum=0.9+nu=0.9+betas=(0.9,0.99)+weight_decay=0.3+column_norm=False",
            dict(mu=0.9, weight_decay=0.3, embedding_decay=0.3),
        ),
        ("muonsn", dict(look=0.8, embedding_beta1=0.5, pre="now")),
    ],
)
def test_a_recipe_of_defaults_is_muonsn(variant, overrides, letters):
    recipe = replace(Recipe(), lr=8e-3, embedding_lr=4e-3, **overrides)
    losses = run_batch(SETUP, [(recipe, 1), (recipe, 2)], letters, "cpu", optimizers)
    rows = train_runs(SETUP, [Run(variant, 8e-3, 4e-3, seed) for seed in (1, 2)], letters, build)
    for loss, row in zip(losses, rows, strict=True):
        assert abs(loss - row["val_loss"]) < 5e-4


@pytest.mark.slow
def test_every_recipe_trains(letters):
    for name, overrides in recipes_named("all").items():
        setup = replace(SETUP, iterations=3)
        (loss,) = run_batch(setup, [(make(overrides), 1)], letters, "cpu", optimizers)
        assert math.isfinite(loss) and loss < 2.7, name


def test_unknown_recipes_are_refused():
    with pytest.raises(UserError, match="unknown recipe 'nonsense'"):
        recipes_named("nonsense")
    with pytest.raises(UserError, match="has no colour"):
        make(dict(colour=1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_recorded_graph_equals_the_loop(letters):
    runs = [(Recipe(), 1), (Recipe(), 2), (replace(Recipe(), rank=2), 1)]
    on_cpu, recorded = (
        run_batch(SETUP, runs, letters, device, optimizers) for device in ("cpu", "cuda")
    )
    for a, b in zip(on_cpu, recorded, strict=True):
        assert abs(a - b) < 5e-3  # bfloat16 products in Newton-Schulz there
