import pytest
import torch

from leangpt.system.errors import UserError
from leangpt.system.runtime import DATA_STREAM, iteration_seed, setup_runtime


def test_auto_on_this_machine():
    runtime = setup_runtime()
    assert runtime.device_type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert runtime.is_main and runtime.world_size == 1
    assert str(runtime.device) in runtime.describe() and runtime.reason in runtime.describe()


def test_cpu_defaults_to_float32_without_autocast():
    runtime = setup_runtime("cpu")
    assert runtime.dtype == torch.float32 and runtime.reason == "asked for"
    with runtime.autocast():
        assert not torch.is_autocast_enabled("cpu")
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_autocast_computes_in_the_dtype(name):
    with setup_runtime("cpu", name).autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == getattr(torch, name)


def test_seed_decides_what_is_drawn():
    draws = []
    for seed in (5, 5, 6):
        setup_runtime("cpu", seed=seed)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    runtime = setup_runtime("cpu")
    runtime.seed(11)
    first = torch.nn.functional.dropout(torch.ones(64), 0.5)
    runtime.seed(11)
    assert torch.equal(first, torch.nn.functional.dropout(torch.ones(64), 0.5))


def test_iteration_seeds_do_not_meet():
    seeds = {
        iteration_seed(seed, iteration, stream)
        for seed in (1337, 1338, 1339)
        for iteration in range(0, 600_000, 97)
        for stream in (DATA_STREAM, 1, 2)
    }
    assert len(seeds) == 3 * 3 * len(range(0, 600_000, 97))
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"device": "cpu", "dtype": "float64"}, "unknown dtype 'float64'"),
        ({"device": "cpu", "backend": "mpi"}, "unknown backend 'mpi'"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(UserError, match=says):
        setup_runtime(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_but_absent():
    with pytest.raises(UserError, match="no CUDA device is available; use device=cpu"):
        setup_runtime("cuda")


def test_bad_torchrun_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE='two'"):
        setup_runtime("cpu")


def test_a_process_of_several_without_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR is not: start several processes with torch"):
        setup_runtime("cpu")


def test_nccl_needs_cuda(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="nccl"):
        setup_runtime("cpu", backend="nccl")


def test_mean_of_one_process_is_the_value():
    assert setup_runtime("cpu").mean_over_processes([1.5, -2.0]) == [1.5, -2.0]
