"""Two processes, or more, of one thread each that talk through gloo, for tests of sharding."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from leangpt.system.runtime import leave


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def failures_of(work, processes=2):
    """Run work(rank, failures) in each; it adds what went wrong to the list, which is returned."""
    with mp.get_context("spawn").Manager() as manager:
        failures = manager.list()
        mp.spawn(_begin, args=(work, free_port(), failures, processes), nprocs=processes)
        return list(failures)


def _begin(rank, work, port, failures, processes):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    work(rank, failures)
    dist.barrier()
    dist.destroy_process_group()
    leave()  # what is left of gloo's threads may abort an interpreter that is taken down
