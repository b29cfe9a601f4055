"""Causal attention whose keys and values lie on several processes, exact, tile by tile.

Process r has the early piece r and the late piece 2 K - 1 - r of P rows each (pieces.py). In step
s = 1 .. K - 1 its queries meet the keys of process r - s, while its own keys go to r + s:

    keys of a process before r    its early piece, for all queries here
    keys of a process after r     both of its pieces, for the late queries here

Two pieces' worth either way, so nobody waits for anybody. A piece travels tile by tile, K and V of
the G key/value heads alone: a step has 2 n slots, where a piece has n tiles. What a slot needs is
asked for one slot before, so that it travels behind attention; attention of tiles is merged by
logsumexp, as on one device. What moves in a slot follows from r, s and the slot: nobody negotiates.

In backward the tile's dk and dv go back to where it came from, two slots later, and are added up.

Own rows are in the order of the sequence, so attention among them is ordinary.
"""

from functools import partial

import torch
import torch.distributed as dist

from leangpt.attention.kv_source import attend_rows, head_rows, key_tiles, merge_keys_


class Ring:
    """The processes that share a sequence, and what travels between them."""

    def __init__(self, group):
        self.group, self.rank = group, dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self.peers = dist.get_process_group_ranks(group)
        dist.barrier(group)  # the first call of a group is to be everybody's

    def slots(self, P, tile):
        """For each slot: (from whom, tile, whole) of the keys that arrive for it, and (to whom,
        tile) of those that leave; None where none do. A tile: (start, stop) of the owner's rows;
        whole: are they for all queries here, or for the late ones?"""
        tiles = key_tiles(0, P, tile)
        late = [(P + a, P + b) for a, b in tiles]
        plan = []
        for s in range(1, self.ranks):
            source, goal = (self.rank - s) % self.ranks, (self.rank + s) % self.ranks
            for slot, rows in enumerate(tiles + late):
                half = tiles[slot // 2] if slot % 2 == 0 else None
                arrives = rows if source > self.rank else half
                leaves = rows if goal < self.rank else half
                plan.append(
                    (arrives and (source, arrives, source < self.rank), leaves and (goal, leaves))
                )
        return plan

    def move(self, messages):
        """Start [(send or receive, process, tensor)] -> what wait() wants."""
        ops = [
            dist.P2POp(dist.isend if sends else dist.irecv, tensor, self.peers[peer], self.group)
            for sends, peer, tensor in messages
        ]
        return dist.batch_isend_irecv(ops) if ops else []

    # ------------------------------------------------------------------ forward

    def attend(self, queries, source, ranges, P, kv_heads, fixed_shapes):
        """Attention of some of the rows here over all that they may see, wherever it lies.

        queries: q (B, H, t, D) of each of `ranges`, (start, stop) of an early and a late run of
        rows. source: of the G = kv_heads keys and values here. -> [(out like q, lse (B, H, t))].
        """
        attended = [
            self.begun(attend_rows(q, source, *rows, fixed_shapes))
            for q, rows in zip(queries, ranges)
        ]
        pairs = list(zip(queries, attended))

        def visit(k, v, whole):
            for q, (out, lse) in pairs if whole else pairs[1:]:
                merge_keys_(out, lse, q, k, v, fixed_shapes)

        B, _, _, D = queries[0].shape
        like = queries[0].new_empty(2, B, kv_heads, 0, D)
        self.visit(partial(head_rows, source), like, P, source.k_chunk, visit)
        return [(out.to(q.dtype), lse) for q, (out, lse) in pairs]

    @staticmethod
    def begun(attended):
        """Attention so far, in what more can be merged into."""
        out, lse = attended
        wide = torch.promote_types(out.dtype, torch.float32)
        return out.to(wide), lse.clone(memory_format=torch.contiguous_format)

    def backward(self, pair, queries, source, like, P):
        """dk and dv of the keys and values here from the queries of the others: (2, B, G, 2 P, D)
        float32 or wider.

        pair(start, stop, q, k, v, causal) -> (dk, dv) of some keys from query rows here, whose dq
        it adds up. queries, source: of the rows here. like: see `visit`.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        sums = torch.zeros(*like.shape[:3], 2 * P, like.size(4), dtype=wide, device=like.device)

        def visit(k, v, whole):
            total = torch.zeros(2, *k.shape, dtype=wide, device=k.device)
            for rows in key_tiles(0 if whole else P, 2 * P, source.k_chunk):
                for one, part in zip(total, pair(*rows, *queries.rows(*rows), k, v, False)):
                    one += part
            return total

        def back(rows, came):
            sums[:, :, :, slice(*rows)] += came

        self.visit(partial(head_rows, source), like, P, source.k_chunk, visit, back)
        return sums

    # ------------------------------------------------------------------ what travels

    def visit(self, own, like, P, tile, visit, back=None):
        """visit(k, v, whole) for each tile of the other processes' keys and values.

        own(start, stop) -> (k, v) of rows here, for the others. like: (2, B, G, 0, D), of their
        shape but for the rows. In backward visit returns what is to go back, (2, B, G, t, D), and
        back(rows, came) takes what came back for rows here.
        """
        plan = self.slots(P, tile)
        made = {}  # slot -> what goes back of it
        moving = self.ask(plan, 0, own, like, made, back)
        for n in range(len(plan) + 2 * (back is not None)):
            keys, came = self.arrived(moving)
            moving = self.ask(plan, n + 1, own, like, made, back)
            if came is not None:
                back(*came)
                came = None  # not held while others' keys are visited
            if keys is not None:
                made[n] = visit(*keys, plan[n][0][2])
        self.arrived(moving)

    def ask(self, plan, n, own, like, made, back):
        """Start what slot n needs, and the way back of what slot n - 2 made."""
        messages, keys, came = [], None, None
        if n < len(plan):
            arrives, leaves = plan[n]
            if leaves:
                messages.append((True, leaves[0], torch.stack(own(*leaves[1]))))
            if arrives:
                keys = self.room(like, arrives[1])
                messages.append((False, arrives[0], keys))
        if back is not None and 0 <= n - 2 < len(plan):
            arrived, left = plan[n - 2]
            if arrived:
                messages.append((True, arrived[0], made.pop(n - 2)))
            if left:
                wide = torch.promote_types(like.dtype, torch.float32)
                came = left[1], self.room(like, left[1], wide)
                messages.append((False, left[0], came[1]))
        return self.move(messages), messages, keys, came

    @staticmethod
    def room(like, rows, dtype=None):
        """For the keys and values of rows (start, stop), or their gradients."""
        return like.new_empty(*like.shape[:3], rows[1] - rows[0], like.size(4), dtype=dtype)

    @staticmethod
    def arrived(moving):
        """Wait for what `ask` started -> (keys, what came back)."""
        works, _, keys, came = moving
        for work in works:
            work.wait()
        return keys, came
