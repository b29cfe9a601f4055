"""A run of one process or of several, as torchrun starts them, forked from the campaign's own."""

import socket

from experiments.reliability.zygote import Child, Ended


def run_in(processes, words, folder, real=False, delay=None, number=9) -> Ended:
    """The end of a script, of its first process where there are several.

    All are sent the signal `number` after `delay` seconds, or none is.
    """
    if processes == 1:
        child = Child(words, folder, real=real)
        return child.wait() if delay is None else child.end_in(delay, number)
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    children = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        place = folder if rank == 0 else _other_name(folder, rank)
        children.append(Child(words, place, real=real, **shared, **ranks))
    first, *others = children
    ended = first.wait() if delay is None else first.end_in(delay, number)
    for other in others:
        other.wait() if delay is None else other.end_in(0, number)
    return ended


def _other_name(folder, rank):
    """The same folder by another name, so that each process has output files of its own."""
    link = folder.with_name(f"{folder.name}-rank{rank}")
    if not link.is_symlink():
        link.symlink_to(folder)
    return link


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
