"""The chunked loss against torch's own: values, gradients, what is ignored, what is refused."""

import pytest
import torch
from reference import relative_error
from torch.nn import functional as F

from leangpt.layers import chunked_cross_entropy
from leangpt.layers.loss import chunk_rows
from leangpt.memory.meter import measure_peak
from leangpt.system.errors import UserError

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    ),
]


@pytest.mark.parametrize("dtype,tolerance", ((torch.float64, 1e-12), (torch.float32, 1e-6)))
def test_chunked_loss_is_cross_entropy(dtype, tolerance, monkeypatch):
    monkeypatch.setattr("leangpt.layers.loss.CHUNK_BYTES", {"cpu": 0})  # chunks of 64 rows
    torch.manual_seed(0)
    hidden = torch.randn(3, 57, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(50, (3, 57))
    targets[torch.rand(3, 57) < 0.1] = -100
    logits = (hidden @ weight.T).flatten(0, 1).double()
    expected = F.cross_entropy(logits, targets.flatten())
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    assert relative_error(loss, expected) < tolerance
    for a, b in zip(found, wanted):
        assert a.dtype == dtype and relative_error(a, b) < tolerance
    with torch.no_grad():
        assert relative_error(chunked_cross_entropy(hidden, weight, targets), expected) < tolerance


@pytest.mark.slow
def test_one_chunk_of_logits_is_alive_at_a_time():
    def peak(chunks):
        hidden = torch.randn(512 * chunks, 16, requires_grad=True)
        weight = torch.randn(8192, 16, requires_grad=True)
        targets = torch.randint(8192, (len(hidden),))
        return measure_peak(lambda: chunked_cross_entropy(hidden, weight, targets))

    chunk = 512 * 8192 * 4
    assert chunk_rows(4 * 512, 8192, "cpu") == 512
    one, four = peak(1), peak(4)
    assert four - one < 0.1 * chunk and one < 2.2 * chunk


def test_chunked_loss_gradcheck():
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 8, -100, 3, 3, 2, 1])
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets), (hidden, weight)
    )


def test_all_targets_ignored_is_nan_as_in_torch():
    loss = chunked_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.full((2,), -100))
    assert torch.isnan(loss)


@pytest.mark.parametrize("ignore_index", (-100, -1, 3, 70))
def test_any_index_can_be_ignored(ignore_index):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 8), torch.randn(50, 8)
    targets = torch.randint(50, (40,))
    targets[::7] = ignore_index
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=ignore_index)
    loss = chunked_cross_entropy(hidden, weight, targets, ignore_index=ignore_index)
    assert relative_error(loss, expected) < 1e-6


@pytest.mark.parametrize(
    "wrong, words",
    (
        ((-100, -1), "target -1 is"),
        ((50,), "target 50 is"),
        ((-7, 2**40), f"targets from -7 to {2**40} are"),
    ),
)
def test_a_target_outside_the_vocabulary_is_refused(wrong, words):
    hidden, weight, targets = torch.randn(9, 8), torch.randn(50, 8), torch.randint(50, (9,))
    targets[: len(wrong)] = torch.tensor(wrong)
    with pytest.raises(UserError, match=words):
        chunked_cross_entropy(hidden, weight, targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("V", (50, 50304))
def test_on_cuda_a_wrong_target_hurts_nothing_and_is_told_of_by_a_later_call(V, dtype):
    hidden = torch.randn(64, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(V, 64, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (64,), device="cuda")
    bad = targets.clone()
    bad[5] = V + 10**6
    chunked_cross_entropy(hidden, weight, targets).item()  # kernels are there
    hidden.grad = weight.grad = None
    torch.cuda._sleep(10**9)  # the device is behind, as it is in training
    loss = chunked_cross_entropy(hidden, weight, bad)
    loss.backward()
    assert loss.isnan() and hidden.grad.eq(0).all() and weight.grad.eq(0).all()
    torch.cuda.synchronize()
    with pytest.raises(UserError, match=f"target {V + 10**6} is outside the vocabulary of {V}"):
        for _ in range(2):
            chunked_cross_entropy(hidden, weight, targets)
            torch.cuda.synchronize()
    for _ in range(3):  # told once
        expected = F.cross_entropy(hidden.float() @ weight.float().T, targets)
        assert abs(chunked_cross_entropy(hidden, weight, targets) - expected) < 2e-2 * expected
        torch.cuda.synchronize()


@pytest.mark.parametrize("targets", (torch.zeros(4, dtype=torch.int64), torch.zeros(5)))
def test_targets_of_another_shape_or_dtype_are_refused(targets):
    with pytest.raises(UserError, match="targets must be int64 of shape"):
        chunked_cross_entropy(torch.randn(5, 8), torch.randn(50, 8), targets)
