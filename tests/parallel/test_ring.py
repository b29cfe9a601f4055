"""Sequences in pieces on several processes, against the plain model in float64."""

import pytest
import torch
import torch.distributed as dist
from two_processes import failures_of

from leangpt.parallel.pieces import Pieces, cut_sequences
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

CASES = {  # T: not a multiple of the pieces either
    "cache": dict(T=32),
    "rope, GQA, ragged tiles": dict(T=31, position="rope", n_kv_head=2, q_chunk=6, k_chunk=3),
    "recompute": dict(T=45, attention_policy="recompute", q_chunk=8, k_chunk=5),
    "checkpoint_layers": dict(T=37, checkpoint_layers=True, q_chunk=10, attention_policy="grouped"),
    "fewer rows than pieces": dict(T=3, checkpoint_layers=True),
    "untied": dict(T=18, tie_embeddings=False, position="none"),
}


def model_of(T, **options):
    torch.manual_seed(0)
    shape = dict(block_size=48, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
    return GPT(GPTConfig(**shape, **options)).double()


def loss_and_gradients(model, x, y):
    loss = model(x, y)[1]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def work(rank, failures):
    ranks = dist.get_world_size()
    for name, options in CASES.items():
        generator = torch.Generator().manual_seed(1)
        T = options["T"]
        x, y = torch.randint(50, (2, 3, T), generator=generator)
        y[0, : T // 2] = -100  # targets that do not count lie unevenly
        plain, cut = model_of(**options | {"q_chunk": None, "k_chunk": None}), model_of(**options)
        expected = loss_and_gradients(plain, x, y)
        cut_sequences(cut, cut.transformer.h, ranks)
        found = loss_and_gradients(cut, x, y)
        for one, other in zip(expected, found):
            dist.all_reduce(other)
            other /= ranks
            if not torch.allclose(one, other, rtol=1e-9, atol=1e-12):
                failures.append(f"{name}, rank {rank}: {(one - other).abs().max().item()}")
        with torch.no_grad():  # in place
            loss = cut(x, y)[1]
        dist.all_reduce(loss)
        if not torch.allclose(loss / ranks, expected[0], rtol=1e-9):
            failures.append(f"{name}, rank {rank}: {loss / ranks} without gradients")
    try:
        cut(x)
        failures.append("logits of some rows were given for those of all")
    except UserError:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("processes", (2, 3, pytest.param(4, marks=pytest.mark.campaign)))
def test_loss_and_gradients_are_those_of_one_process(processes):
    assert not failures_of(work, processes)


def test_every_process_has_an_early_and_a_late_piece():
    x = torch.arange(14)[None]
    rows = []
    for rank in range(2):
        pieces = Pieces.__new__(Pieces)
        pieces.rank, pieces.ranks = rank, 2
        mine = pieces.of_rows(x, -1)
        P = pieces.length(14)
        positions = pieces.positions(torch.arange(2 * P), P)
        assert torch.equal(mine[0][mine[0] >= 0], positions[positions < 14])
        rows.append(positions)
    assert sorted(torch.cat(rows).tolist()) == list(range(16))
