"""A saved optimizer state goes on cropped where its model is, and is refused whole."""

import copy

import pytest
import torch
from torch import nn

from leangpt.optim import VARIANTS, build_optimizer
from leangpt.optim.momentum import dequantize
from leangpt.optim.resume import load_optimizer

ROWS, COLUMNS, KEPT = 12, 24, 5


class Positions(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.embedding = nn.Embedding(rows, COLUMNS)
        self.linear = nn.Linear(COLUMNS, 8)

    def forward(self):
        return self.linear(self.embedding.weight).square().mean()


def trained(variant, **options):
    torch.manual_seed(0)
    model = Positions(ROWS)
    optimizer = build_optimizer(model, variant, **options)
    for _ in range(3):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def shapes_of(model):
    return {name: p.shape for name, p in model.named_parameters()}


def as_numbers(state, shape):
    """Every statistic of a parameter's state as an array of its shape."""
    numbers = {}
    for name, value in state.items():
        if name == "momentum" and "momentum_scale" in state:
            scales = state["momentum_scale"][None]
            numbers[name] = dequantize(value[None], scales, state["step"], torch.Size((1, *shape)))[
                0
            ]
        elif name == "row_mean_square":
            columns = state["column_mean_square"]
            numbers["second_moment"] = value * columns / value.mean()
        elif name == "second_moment":
            spread = value.flatten().repeat_interleave(shape[0] * shape[1] // value.numel())
            numbers[name] = spread.view(shape)
        elif torch.is_tensor(value) and value.shape == shape:
            numbers[name] = value
    return numbers


@pytest.mark.filterwarnings("ignore:partition")
@pytest.mark.parametrize("variant", VARIANTS)
def test_state_of_rows_that_stay_is_kept(variant):
    model, optimizer = trained(variant)
    whole = as_numbers(optimizer.state[model.embedding.weight], (ROWS, COLUMNS))
    saved = copy.deepcopy(optimizer.state_dict())
    shorter = Positions(KEPT)
    other = build_optimizer(shorter, variant)
    assert load_optimizer(other, shorter, saved, shapes_of(model)) is None
    cropped = as_numbers(other.state[shorter.embedding.weight], (KEPT, COLUMNS))
    assert cropped.keys() == whole.keys() and cropped
    for name in whole:
        want, have = whole[name][:KEPT], cropped[name]
        if variant == "adamsn8" and name == "second_moment":  # runs of other lengths: means of it
            assert torch.allclose(want.mean(), have.mean(), rtol=0.2)
        else:
            assert torch.allclose(want, have, rtol=1e-6), name
    assert int(other.state[shorter.embedding.weight]["step"]) == 3
    shorter().backward()
    before = shorter.embedding.weight.clone()
    other.step()
    assert (shorter.embedding.weight - before).abs().max() < 0.5


def damages(saved):
    """(what is wrong, a state_dict) of each way in which a state may not fit."""
    entry = next(i for i, e in saved["state"].items() if any(map(is_matrix, e.values())))
    name = next(name for name, value in saved["state"][entry].items() if is_matrix(value))
    value = saved["state"][entry][name]
    for what, wrong in {
        "a row short": value[1:].clone(),
        "a column short": value[:, 1:].clone(),
        "float16": value.half() if value.dtype != torch.float16 else value.float(),
        "sparse": value.float().to_sparse(),
        "a number": 3.0,
        "a text": "no",
    }.items():
        damaged = copy.deepcopy(saved)
        damaged["state"][entry][name] = wrong
        yield what, damaged
    for step in (None, "1", -1, torch.ones(2), 2**70):
        damaged = copy.deepcopy(saved)
        damaged["state"][entry]["step"] = step
        yield f"step {step}", damaged
    missing = copy.deepcopy(saved)
    del missing["state"][entry][name]
    yield "lacks one", missing
    yield "groups", saved | {"param_groups": [{"params": [0]}]}
    yield "no groups", {"state": saved["state"]}
    yield "a list", saved | {"state": [1]}
    yield "an entry", saved | {"state": saved["state"] | {entry: 7}}
    yield "twice", saved | {"param_groups": saved["param_groups"] * 2}


def is_matrix(value):
    return torch.is_tensor(value) and value.ndim == 2 and value.numel() > 8


@pytest.mark.filterwarnings("ignore:partition")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_that_does_not_fit_leaves_everything_as_it_was(variant):
    model, optimizer = trained(variant)
    saved = copy.deepcopy(optimizer.state_dict())
    for what, damaged in damages(saved):
        for own in (optimizer, build_optimizer(model, variant)):  # one with a state, one without
            before = copy.deepcopy(own.state_dict())
            assert load_optimizer(own, model, damaged), what
            after = own.state_dict()
            assert str(after["param_groups"]) == str(before["param_groups"]), what
            assert after["state"].keys() == before["state"].keys(), what
            for number, entry in before["state"].items():
                for name, value in entry.items():
                    now = after["state"][number][name]
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(now)), (what, name)
    model().backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_another_cropping_is_refused():
    model, optimizer = trained("adam")
    longer = Positions(ROWS + 1)
    other = build_optimizer(longer, "adam")
    reason = load_optimizer(other, longer, optimizer.state_dict(), shapes_of(model))
    assert "exp_avg of a weight (13, 24) is torch.float32 (12, 24)" in reason
    assert not other.state
