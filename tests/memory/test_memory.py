"""The meter must be exact: every case here has a peak that can be counted by hand."""

import pytest
import torch
from torch.nn import functional as F

from leangpt.memory.meter import PeakMeter, measure_peak, tensor_bytes
from leangpt.system.errors import UserError

MB = 1 << 20
ONE = torch.tensor(1.0)  # a Python number would itself be wrapped in a tensor of a few bytes


def floats(megabytes):
    return torch.empty(megabytes * MB // 4)


def test_a_sequence_of_allocations_has_the_peak_of_what_is_alive_at_once():
    def fn():
        a = floats(3)
        b = floats(2)  # 5 alive
        del a
        c = floats(1)  # 3 alive
        del b
        d = floats(5)  # 6 alive
        del c, d
        return floats(4)

    assert measure_peak(fn) == 6 * MB


def test_views_and_in_place_operators_are_free():
    x = floats(4).zero_()

    def fn():
        x.view(2, -1)[1].add_(ONE).mul_(ONE)
        return x[::2]

    assert measure_peak(fn) == 0


@pytest.mark.slow
def test_the_result_counts_and_what_stood_before_does_not():
    x = floats(4).zero_()
    assert measure_peak(lambda: x + ONE) == 4 * MB
    assert measure_peak(lambda: (x + ONE) * ONE) == 8 * MB


def test_blocks_freed_inside_that_stood_before_are_not_deducted():
    held = [floats(8)]

    def fn():
        held.clear()
        return floats(2)

    assert measure_peak(fn) == 2 * MB


@pytest.mark.slow
def test_addresses_of_earlier_measurements_do_not_leak_into_later_ones():
    """Allocated inside a measurement, freed outside, the address reused, freed inside again."""
    held = []
    for _ in range(20):
        measure_peak(lambda: held.append(torch.empty(1000)))
        address = held.pop().data_ptr()
        held.append(torch.empty(996))  # of another size: the profiler still thinks 4000 bytes
        if held[0].data_ptr() == address:
            break
        held.clear()
    else:
        pytest.skip("the allocator never handed out an address twice")

    def fn():
        held.clear()
        return floats(3)

    assert measure_peak(fn) == 3 * MB


def test_autograd_backward_is_seen():
    x = floats(4).fill_(0.5).requires_grad_()

    def fn():
        x.grad = None
        y = x.exp()  # saves its result
        y.backward(gradient)

    gradient = torch.ones_like(x)
    # y, grad * y; then the leaf keeps that gradient itself
    assert measure_peak(fn) == 8 * MB


def test_threads_of_the_autograd_engine_are_seen():
    """A custom function that calls the engine again runs its inner backward inside the outer."""

    class Reenter(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                inner = x.detach().requires_grad_()
                (g,) = torch.autograd.grad(inner.exp().sum(), inner)
            return g

    x = floats(2).zero_().requires_grad_()

    def fn():
        x.grad = None
        Reenter.apply(x).backward()

    scalars = 64
    # inner exp and its gradient, which becomes x.grad
    assert 4 * MB <= measure_peak(fn) <= 4 * MB + scalars


def test_fused_attention_holds_its_output_and_one_tile_not_the_scores():
    B, H, T, D = 1, 8, 1024, 32
    q, k, v = torch.randn(3, B, H, T, D).unbind(0)
    peak = measure_peak(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    output = B * H * T * D * 4
    scores = B * H * T * T * 4
    assert output < peak < scores / 4


@pytest.mark.slow
def test_compiled_code_is_measured_like_eager_code():
    x = floats(4).zero_()

    def eager(x):
        return (x.sin() + ONE).cos()

    compiled = torch.compile(eager)
    compiled(x)
    assert measure_peak(lambda: eager(x)) == 8 * MB
    assert measure_peak(lambda: compiled(x)) == 4 * MB  # fused: no intermediate exists


def test_tick_reads_events_in_windows_and_keeps_what_is_alive():
    with PeakMeter() as meter:
        a = floats(4)
        meter.tick()
        assert meter.peak == 4 * MB
        b = floats(3)
        meter.tick()
        assert meter.peak == 7 * MB
        del a  # allocated two windows ago
        c = floats(2)
    assert meter.peak == 7 * MB
    assert meter.now == 5 * MB
    del b, c


@pytest.mark.slow
def test_an_error_inside_stops_the_meter():
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure_peak(fails)
    assert measure_peak(lambda: floats(1)) == MB


def test_tensor_bytes_counts_each_storage_once():
    a = floats(2)
    linear = torch.nn.Linear(8, 4)
    assert tensor_bytes([a, a.view(2, -1), a[:10]]) == 2 * MB
    assert tensor_bytes(linear) == (8 * 4 + 4) * 4
    tied = torch.nn.ModuleList([torch.nn.Embedding(4, 8), torch.nn.Linear(8, 4, bias=False)])
    tied[1].weight = tied[0].weight
    assert tensor_bytes(tied) == 4 * 8 * 4


def test_unknown_devices_are_refused():
    with pytest.raises(UserError, match="cpu and cuda"):
        measure_peak(lambda: None, "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_is_exact():
    x = torch.zeros(4 * MB // 4, device="cuda")
    assert measure_peak(lambda: x + 1, "cuda") == 4 * MB
    assert measure_peak(lambda: (x + 1) * 2, "cuda") == 8 * MB
