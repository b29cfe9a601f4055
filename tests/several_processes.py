"""train.py in several processes of this machine, run after run without starting Python anew."""

import os

import torch
import torch.multiprocessing as mp
from two_processes import free_port

import train


def train_in_processes(processes, *runs):
    """train.main(flags) for each of `runs`, by so many gloo processes of one thread."""
    mp.spawn(_work, args=(processes, [free_port() for _ in runs], runs), nprocs=processes)


def _work(rank, processes, ports, runs):
    torch.set_num_threads(1)
    for port, flags in zip(ports, runs):
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        train.main(flags)
