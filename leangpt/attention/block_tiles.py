"""A transformer block one row tile at a time, exact forward and exact backward.

Output rows [i, j) of a block depend on the input rows [0, j) only. So a tile of q_chunk rows
goes through the whole block at once (norm, queries, attention over a KV source, projection,
residual, MLP) and nothing but the residual stream is ever as long as the sequence. Tiling
attention alone would move nothing: an untiled MLP is the peak under every policy.

Forward without gradients takes the tiles last to first, so that each may overwrite its own rows
of x: L layers need one residual stream. Training saves x, the rows' logsumexp and (unless
checkpoint_layers) attention's output; all else is recomputed tile by tile (Chen et al. 2016,
arXiv 1604.06174, at the grain of a tile): see block_backward.py.

protocol.py says what a block must offer, tile_sizes.py how large tiles are and what they take.
"""

from contextlib import nullcontext
from functools import partial

import torch

# torch.compiler.disable, but torch._dynamo is imported at the first call: 2 s off every start
from torch._compile import _disable_dynamo as graph_break

from leangpt.attention.block_backward import ParameterGradients, backward_tiles, backward_whole
from leangpt.attention.kv_source import attend_rows, key_tiles, row_positions
from leangpt.attention.protocol import TileableBlock
from leangpt.attention.tile_sizes import NO_DROPOUT, few_launches, heads_at_once, mlp_rows
from leangpt.system.errors import UserError


class Tiles:
    """One block's row tiles over x (B, T, C): which rows go together, and what runs them."""

    def __init__(self, block, shape, device, sizes, seed=None, training=False):
        self.config, self.device, self.seed = block.config, device, seed
        self.pieces = getattr(block, "pieces", None)
        parts = block.compiled or block
        self.project, self._finish, self._plain = parts.project, parts.finish, parts.plain
        self.batch, self.length, _ = shape
        self.q_chunk, self.k_chunk = sizes
        # rows of the batch at once: a tile holds about q_chunk rows in all
        tile = min(self.length, self.q_chunk)
        self.b_chunk = min(self.batch, max(1, self.q_chunk // tile))
        # rows through the MLP at once, in all
        few = few_launches(device, training)
        self.m_chunk = self.q_chunk if few else mlp_rows(self.b_chunk * tile, device.type, training)
        # nor is there anything to gain from parts where a tile holds whole sequences
        self.whole = few and self.config.checkpoint_layers and self.length <= self.q_chunk
        self.piece = None  # rows of each of two pieces, where others hold the rest
        # cuDNN builds a plan for each shape: worth it where all tiles but the last are alike
        self.fixed_shapes = self.q_chunk % self.k_chunk == 0 and (
            self.length > self.q_chunk or self.length % 128 == 0
        )

        if self.pieces is not None:
            self.whole, self.piece = False, self.length // 2
            runs = -(-self.piece // max(1, self.q_chunk // 2))
            self.run = -(-self.piece // runs)  # rows of a piece that go together
            self.fixed_shapes = not self.piece % self.run and not self.piece % self.k_chunk
            self.project = partial(self._project_placed, parts.project)

    def _project_placed(self, project, x, positions, *args, **kwargs):
        """project, of rows by their number here: by their place in the sequence."""
        return project(x, self.pieces.positions(positions, self.piece), *args, **kwargs)

    def batches(self):
        return [slice(b, b + self.b_chunk) for b in range(0, self.batch, self.b_chunk)]

    def groups(self):
        """The tiles, last to first: each a list of the runs of rows, (start, stop), whose attention
        goes together. One run, or of two pieces one each."""
        if self.piece is None:
            tiles = key_tiles(0, self.length, self.q_chunk)
            return [[tile] for tile in reversed(tiles)]
        runs = key_tiles(0, self.piece, self.run)
        return [[(a, b), (self.piece + a, self.piece + b)] for a, b in reversed(runs)]

    def row_tiles(self):
        """(start, stop) of all runs of rows, last to first."""
        return sorted((run for group in self.groups() for run in group), reverse=True)

    def attend(self, x, source, group):
        """Attention of a group's rows of x (b, T, C) -> [(out (b, H, t, D), lse (b, H, t))]."""
        queries = [self.queries(x, *run) for run in group]
        if self.piece is None:
            return [attend_rows(queries.pop(), source, *group[0], self.fixed_shapes)]
        return self.pieces.ring.attend(
            queries, source, group, self.piece, self.config.kv_heads, self.fixed_shapes
        )

    def mlp_tiles(self, start, stop, batch_rows):
        """(start, stop) of the MLP's smaller tiles inside one row tile."""
        step = max(1, self.m_chunk // batch_rows)
        return [(a, min(a + step, stop)) for a in range(start, stop, step)]

    def head_slices(self):
        """Ranges (first, stop) of the key/value heads whose attention's backward runs at once;
        [None] for all of them."""
        G = self.config.kv_heads
        n = heads_at_once(self.config, self.length, self.q_chunk, self.b_chunk, self.device.type)
        return [None] if n == G else [(a, a + n) for a in range(0, G, n)]

    def by_head(self, x):
        """Rows of attention's output as the kernels want them: (b, t, H D) -> (b, H, t, D)."""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def source(self, x):
        """The policy's KV source over x (b, T, C)."""
        return self.config.source(partial(self.project, parts="kv"), x, self.k_chunk)

    def queries(self, x, start, stop):
        """Queries of rows [start, stop) of x (b, T, C) -> (b, H, t, D)."""
        return self.project(x[:, start:stop], row_positions(start, stop, x.device), "q")[0]

    def finish(self, x, out, start, batch_start):
        """Output projection, residual, MLP, residual, with the dropout of exactly this tile."""
        with self._dropout_seed(start, batch_start):
            return self._finish(x, out)

    def plain(self, x, batch_start):
        """The plain block over whole sequences x (b, T, C), where `whole`."""
        with self._dropout_seed(0, batch_start):
            return self._plain(x)

    def _dropout_seed(self, start, batch_start):
        if self.seed is None:
            return nullcontext()
        return _Seeded(self.seed + 2**20 * batch_start + start, self.device)


class _Seeded:
    """Random numbers from `seed` inside the block; the generators as before after it."""

    def __init__(self, seed, device):
        self.seed = seed
        self.fork = torch.random.fork_rng([device] if device.type == "cuda" else [])

    def __enter__(self):
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error):
        self.fork.__exit__(*error)


def forward_tiles(tiles, x, into, keep=None):
    """Write the block's output for x (B, T, C) into `into`, which may be x itself.

    keep(rows_of_batch, start, stop, out, lse) is called with each tile's attention, if given.
    """
    for batch in tiles.batches():
        xb, yb = x[batch], into[batch]
        source = tiles.source(xb)
        for group in tiles.groups():
            attended = tiles.attend(xb, source, group)
            for (start, stop), (out, lse) in zip(group, attended):
                if keep is not None:
                    keep(batch, start, stop, out, lse)
                for a, b in tiles.mlp_tiles(start, stop, len(xb)):
                    yb[:, a:b] = tiles.finish(
                        xb[:, a:b], out[:, :, a - start : b - start], a, batch.start
                    )
            del attended, out, lse  # before the next tile's are made
        del source  # its K and V, before the next sequences' are made


def fill_cache(block, x, sizes, step, layer):
    """Store what one layer of a KV cache needs of a prompt x (B, T, C), by tiles."""
    tiles = Tiles(block, x.shape, x.device, sizes)
    for batch in tiles.batches():
        for start, stop in key_tiles(0, x.size(1), tiles.k_chunk):
            rows = x[batch, start:stop]
            if layer.parts == "q":  # K and V will come from the stored rows
                layer.store(step, block.ln_1(rows), start=start, batch=batch)
            else:
                k, v = tiles.project(rows, row_positions(start, stop, x.device), "kv")
                layer.store(step, None, k, v, start, batch)
                del k, v  # before the next tile's are made


def run_tiles(
    block: TileableBlock, x: torch.Tensor, sizes: tuple[int, int], inplace: bool = False
) -> torch.Tensor:
    """The block over x (B, T, C) by tiles of sizes (q_chunk, k_chunk) -> (B, T, C).

    inplace: write over x itself; honoured only while no gradient is recorded. Raises UserError for
    attention dropout, which tiles cannot replay.
    """
    if block.attention_dropout > 0:
        raise UserError(NO_DROPOUT)
    if torch.is_grad_enabled():
        return _TiledBlock.apply(x, block, sizes, *block.parameters())
    if getattr(block, "pieces", None) is not None and block.config.source.recomputes:
        inplace = False  # the other processes want keys of rows that would be written over
    into = x if inplace else torch.empty_like(x)
    forward_tiles(Tiles(block, x.shape, x.device, sizes), x, into)
    forget_casts(x.device.type)
    return into


def forget_casts(device_type):
    """Let go of the weights as autocast's products read them. It keeps its copies until the whole
    model is through; of a block by tiles nothing reads them any more."""
    if torch.is_autocast_enabled(device_type):
        torch.clear_autocast_cache()


class _TiledBlock(torch.autograd.Function):
    """A block whose backward recomputes its tiles. Parameters are inputs, so that DDP's hooks,
    autograd.grad and gradient accumulation see them as they would in the plain block."""

    @staticmethod
    @graph_break
    def forward(ctx, x, block, sizes, *parameters):
        device, config = x.device, block.config
        seed = int(torch.randint(2**40, ())) if block.residual_dropout > 0 else None
        ctx.tiles = tiles = Tiles(block, x.shape, device, sizes, seed, training=True)
        ctx.autocast = _autocast_state(device.type)
        B, T, _ = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        ctx.out_dtype = ctx.autocast["dtype"] if ctx.autocast["enabled"] else x.dtype
        out = lse = None
        if not tiles.whole:
            lse = torch.empty(B, config.n_head, T, dtype=wide, device=device)
        if not config.checkpoint_layers:
            width = config.n_head * config.head_dim
            out = torch.empty(B, T, width, dtype=ctx.out_dtype, device=device)

        def keep(batch, start, stop, tile_out, tile_lse):
            lse[batch, :, start:stop] = tile_lse
            if out is not None:
                out[batch, start:stop] = tile_out.transpose(1, 2).flatten(2)

        # first of all: the tiles hide its time
        ctx.host_x = None if block.offload is None else block.offload.stash(x)
        y = torch.empty_like(x)
        if tiles.whole:
            for batch in tiles.batches():
                y[batch] = tiles.plain(x[batch], batch.start)
        else:
            forward_tiles(tiles, x, y, keep)
        forget_casts(device.type)
        ctx.save_for_backward(x if ctx.host_x is None else None, lse, *parameters)
        ctx.out = out  # not saved: backward writes over it, and a second one recomputes it
        return y

    @staticmethod
    @graph_break
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, lse, *parameters = ctx.saved_tensors
        if ctx.host_x is not None:
            x = ctx.host_x.fetch()
        out, ctx.out = ctx.out, None
        weights = ParameterGradients(parameters, ctx.needs_input_grad[3:])
        with torch.autocast(**ctx.autocast):
            if ctx.tiles.whole:
                grad_x = backward_whole(ctx.tiles, x, grad, weights)
            else:
                grad_x = backward_tiles(ctx.tiles, x, lse, out, ctx.out_dtype, grad, weights)
        return (grad_x, None, None, *(weights.total(p) for p in parameters))


def _autocast_state(device_type):
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
    }
