"""The bench for AdamSN and Adafactor must start from what they do, and every recipe must train."""

import csv
import math
from dataclasses import replace

import pytest

from experiments.optimizers.many_runs import Run, Setup, train_runs
from experiments.optimizers.optimizer_variants import build
from experiments.search.adaptive_recipes import RECIPES, expand, name_of, recipes_named
from experiments.search.adaptive_search import optimizers
from experiments.search.recipe_bench import run_batch
from experiments.shared.common import RESULTS
from leangpt.system.errors import UserError

SETUP = Setup("tiny", dict(block_size=16, n_layer=2, n_head=4, n_embd=32), 4, 8, warmup=3)


@pytest.mark.parametrize(
    "variant, family, overrides",
    [
        ("adamsn", "adamsn", dict(roles="f2 p0.125", momentum=0.95, nu=0.8)),
        ("adamsn:role_rates={}+nu1=1.0+betas=(0.9,0.99)", "adamsn", {}),
        ("adam", "adamw", {}),
        ("adafactor", "adafactor", dict(roles="f2 p0.125", qkv_apart=False)),
        ("adafactor:embedding_momentum=0.9+role_rates={}", "adafactor+", dict(qkv_apart=False)),
    ],
)
def test_a_recipe_is_the_optimizer_of_its_name(variant, family, overrides, letters):
    recipe = expand(family, overrides | dict(lr=4e-3, embedding_lr=8e-3))
    losses = run_batch(SETUP, [(recipe, 1), (recipe, 2)], letters, "cpu", optimizers)
    rows = train_runs(SETUP, [Run(variant, 4e-3, 8e-3, seed) for seed in (1, 2)], letters, build)
    for loss, row in zip(losses, rows, strict=True):
        assert abs(loss - row["val_loss"]) < 1e-5


@pytest.mark.slow
def test_every_recipe_trains(letters):
    for name, recipe in recipes_named("4,3").items():
        (loss,) = run_batch(replace(SETUP, iterations=2), [(recipe, 1)], letters, "cpu", optimizers)
        assert math.isfinite(loss) and loss < 2.7, name


def test_names_tell_recipes_apart_and_results_use_them():
    assert name_of("adamsn", dict(nu=0.8, lr=4e-3)) == "adamsn: nu=0.8"
    every = recipes_named("all")
    assert len({repr(recipe) for recipe in every.values()}) == len(every)
    with (RESULTS / "adaptive_search.csv").open(newline="") as file:
        assert {row["recipe"] for row in csv.DictReader(file)} == set(every)
    assert sum(map(len, RECIPES.values())) > len(every)  # bases ran in every round
    with pytest.raises(UserError, match="unknown recipe 'nonsense'"):
        recipes_named("nonsense")
