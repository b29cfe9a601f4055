"""What processes cannot do together is refused by name; how a run that does not say is shared."""

from types import SimpleNamespace

import pytest
import torch
from two_processes import failures_of

import train
from leangpt.parallel.engine import Parallel
from leangpt.parallel.failures import is_lost_process
from leangpt.parallel.modes import parallel_mode
from leangpt.system.errors import UserError
from leangpt.system.runtime import Runtime, setup_runtime
from model import GPT, GPTConfig
from optimizers import make_optimizer


def runtime(world_size=1, device="cpu", dtype=torch.float32):
    return Runtime(torch.device(device), "", dtype, 0, world_size)


@pytest.mark.parametrize(
    "mode, where, says",
    (
        ("twice", {}, "unknown parallel='twice'; choose one of: auto, none, ddp, fsdp"),
        ("none", dict(world_size=2), "parallel=none is one process, and torchrun started 2"),
        ("ddp", {}, "parallel=ddp needs several processes: start them with torchrun"),
        ("fsdp", {}, "parallel=fsdp needs several processes"),
        ("fsdp", dict(world_size=2, dtype=torch.float16), "does not scale float16 gradients"),
        ("fsdp", dict(world_size=2, device="mps"), "runs on CUDA and the CPU, not on mps"),
    ),
)
def test_what_cannot_work_is_refused(mode, where, says):
    with pytest.raises(UserError, match=says):
        Parallel(mode, runtime(**where))


def test_pieces_of_a_sequence_need_their_processes():
    with pytest.raises(UserError, match="context_parallel=2 must divide .* which is 1"):
        setup_runtime("cpu", context_parallel=2)
    with pytest.raises(UserError, match="context_parallel must be positive"):
        train.Settings(context_parallel=0)


def test_a_run_that_does_not_say_is_sharded_where_a_step_does_not_fit(monkeypatch):
    model = GPT(GPTConfig(n_layer=2, n_embd=64, n_head=4))
    settings = train.Settings(optimizer_variant="muonsn8", batch_size=4)

    def mode(memory=80e9, **where):
        properties = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return parallel_mode(settings, model, make_optimizer, runtime(**where))

    assert mode() == "none"
    assert mode(world_size=2) == "ddp"
    assert mode(world_size=2, device="cuda") == "ddp"
    assert mode(world_size=2, device="cuda", memory=1e8) == "fsdp"
    settings.optimizer_options = "fused_backward=True"  # which ddp cannot
    assert mode(world_size=2) == "fsdp"
    settings.parallel = "ddp"
    assert mode(world_size=2) == "ddp"


def gradients_stay(rank, failures):
    shared = Parallel("ddp", Runtime(torch.device("cpu"), "", torch.float32, rank, 2))
    layer = torch.nn.Linear(4, 4)
    model, places = shared.wrap(layer), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for micro_batches in (2, 1, 2):
        for index in range(micro_batches):
            shared.begin_micro_batch(last=index == micro_batches - 1)
            model(torch.ones(1, 4)).sum().backward()
        grads = [p.grad for p in layer.parameters()]
        if any(not torch.equal(g, torch.full_like(g, micro_batches)) for g in grads):
            failures.append(f"{grads} of {micro_batches} micro-batches, rank {rank}")
        places.append({g.untyped_storage().data_ptr() for g in grads})
        optimizer.step()
        shared.zero_gradients(optimizer)
    if len(places[1]) > 1 or places[1] != places[2] or any(g.any() for g in grads):
        failures.append(f"gradients at {places}, rank {rank}")


@pytest.mark.slow
def test_whole_gradients_stay_in_the_buckets_that_travel():
    assert not failures_of(gradients_stay)


def test_only_an_error_of_several_processes_is_a_lost_one(monkeypatch):
    error = RuntimeError("gloo: Connection closed by peer")
    assert not is_lost_process(error)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert is_lost_process(error)
    assert not is_lost_process(RuntimeError("shapes cannot be multiplied"))
