"""Which rows of a sequence a process holds, where several share it (context parallelism).

K processes cut T rows into 2 K pieces. Process r has piece r, an early one, and piece 2 K - 1 - r,
a late one: under a causal mask each then has equally much to attend to (as Llama 3 has it, arXiv
2407.21783, 3.3.2). T is padded at its end to a multiple of 2 K: rows that nothing attends to and
no target belongs to.

    K = 2     rows  | 0 | 1 | 2 | 3 |      process 0: pieces 0 and 3; process 1: pieces 1 and 2

All that is not attention treats each row alone. Attention across processes: ring.py.
"""

import torch
import torch.distributed as dist

from leangpt.parallel.ring import Ring
from leangpt.system.errors import UserError

IGNORED = -100  # what loss.py does not count


class Pieces:
    """The rows of one process out of `group`."""

    def __init__(self, group):
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.ring = Ring(group)

    def length(self, T: int) -> int:
        """Rows of a piece, where T tokens are a sequence."""
        return -(-T // (2 * self.ranks))

    def of_rows(self, x: torch.Tensor, fill: int) -> torch.Tensor:
        """This process's rows of x (B, T) -> (B, 2 P): its early piece, then its late one."""
        P = self.length(x.size(1))
        x = torch.nn.functional.pad(x, (0, 2 * self.ranks * P - x.size(1)), value=fill)
        late = 2 * self.ranks - 1 - self.rank
        return torch.cat([x[:, n * P : (n + 1) * P] for n in (self.rank, late)], dim=1)

    def positions(self, rows: torch.Tensor, P: int) -> torch.Tensor:
        """Places in the sequence of rows (t,) int64 of those here, P of them a piece."""
        late = 2 * self.ranks - 1 - self.rank
        return rows + torch.where(rows < P, self.rank * P, (late - 1) * P)

    def share(self, idx: torch.Tensor, targets: torch.Tensor | None):
        """What this process computes of idx and targets (B, T) int64 -> (idx, targets, positions,
        count), the first two (B, 2 P), positions (2 P,).

        count: () float64, what the sum of losses here is to be divided by, so that the mean over
        all processes is the mean over all targets. Raises UserError where there are no targets.
        """
        if targets is None:
            raise UserError("logits are not gathered from the pieces of a sequence: pass targets")
        T = idx.size(1)
        P = self.length(T)
        positions = self.positions(torch.arange(2 * P, device=idx.device), P)
        count = (targets != IGNORED).sum().double() / self.ranks
        return (
            self.of_rows(idx, 0),
            self.of_rows(targets, IGNORED),
            positions.clamp_(max=T - 1),  # padding has a place in the table, too
            count,
        )


def cut_sequences(model: torch.nn.Module, blocks, context_parallel: int) -> None:
    """Let a GPT compute on this process's pieces of each sequence; it is still called with whole
    ones. Every `context_parallel` neighbouring processes share their sequences."""
    group, _ = dist.new_subgroups(context_parallel)
    pieces = Pieces(group)
    model.pieces = pieces
    for block in blocks:
        block.pieces = pieces
