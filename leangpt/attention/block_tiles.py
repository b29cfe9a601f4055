"""A transformer block one row tile at a time, exact forward and exact backward.

Output rows [i, j) of a block depend on the input rows [0, j) only. So a tile of q_chunk rows
goes through the whole block at once (norm, queries, attention over a KV source, projection,
residual, MLP) and nothing but the residual stream is ever as long as the sequence. Tiling
attention alone would move nothing: an untiled MLP is the peak under every policy.

Forward without gradients takes the tiles last to first, so that each may overwrite its own rows
of x: L layers need one residual stream. Training saves x, the rows' logsumexp and (unless
checkpoint_layers) attention's output; all else is recomputed tile by tile (Chen et al. 2016,
arXiv 1604.06174, at the grain of a tile): see attention/block_backward.py.

Extra memory beyond x and the output, in numbers (b rows of the batch at once, q = q_chunk,
k = k_chunk, G D = C/g):  forward  the most of  b (3 q C + 2 k C/g), on the CPU 2 q C + 4 k C/g,
and b (q C + 11 m C), m the rows of an MLP tile, q/4 or, on the CPU, down to q/8;
`cache` and `grouped` add 2 T C/g for K and V;  backward, of n of the G key/value heads at once,
adds the gradient of x, T C n/G float32 for dq and, unless `recompute` with n = G, as many for q.
"""

from contextlib import nullcontext

import torch

# torch.compiler.disable, but torch._dynamo is imported at the first call: 2 s off every start
from torch._compile import _disable_dynamo as graph_break

from attention_policies import attend_rows, row_source
from leangpt.attention.block_backward import ParameterGradients, backward_tiles, backward_whole
from leangpt.attention.offload import fetch, stash
from leangpt.system.errors import UserError

SHORT = 6144  # tokens: training on so few takes no tiles on the CPU


def tile_sizes(config, T, device_type, training=None):
    """(q_chunk, k_chunk) for a block over T tokens, or None for the plain block.

    Recomputing K and V costs C / (g q_chunk) of attention's own arithmetic, g = H/G: q_chunk is
    several times C/g unless given. Training sequences of up to one and a half such tiles, and of
    SHORT tokens on the CPU, run plain: so short, tiles would take 1.3 times plain's time.
    """
    training = torch.is_grad_enabled() if training is None else training
    chunk = default_chunk(config, device_type)
    if training and config.checkpoint_layers:
        q_chunk = config.q_chunk or chunk
    elif config.attention_policy == "recompute":
        short = max(3 * chunk // 2, SHORT if device_type == "cpu" else 0)
        if training and config.q_chunk is None and T <= short:
            return None
        q_chunk = config.q_chunk or chunk
    elif config.q_chunk:
        q_chunk = config.q_chunk
    else:
        return None
    return q_chunk, config.k_chunk or min(q_chunk, 16384)


def default_chunk(config, device_type):
    """Rows a tile when none are asked for: 8 C/g (CPU) or 16 C/g (CUDA), as a power of two."""
    times = 16 if device_type == "cuda" else 8
    rows = times * config.n_embd * config.kv_heads // config.n_head
    return min(max(512, 1 << (rows - 1).bit_length()), 16384)


def heads_at_once(config, T, q_chunk, sequences, device_type):
    """How many of G key/value heads, a divisor of it, backward takes at once over T rows.

    Their queries and dq are kept for all rows: as few heads as make those no more numbers than
    all heads of a tile. But the fused CPU kernel's backward gives each thread one key/value head of
    one sequence at a time, so there are at least as many as threads; and CUDA, which wants few
    launches, takes all.
    """
    G = config.kv_heads
    for n in range(1, G):
        filled = sequences * n >= torch.get_num_threads() and n * T >= G * q_chunk
        if G % n == 0 and filled and device_type == "cpu":
            return n
    return G


def few_launches(device, training):
    """Are large tiles worth their memory? To a CUDA device while training, which else waits."""
    return device.type == "cuda" and training


def mlp_rows(rows, device_type, training):
    """Rows through the MLP at once, of a tile of `rows`: a quarter, or on the CPU fewer, as long as
    they keep it busy; there nothing else would then be the peak of a forward pass."""
    quarter = max(1, rows // 4)
    return min(quarter, max(512, rows // 8)) if device_type == "cpu" and not training else quarter


class Tiles:
    """One block's row tiles over x (B, T, C): how each part of it is computed."""

    def __init__(self, block, shape, device, sizes, seed=None, training=False):
        self.block, self.device, self.seed = block, device, seed
        self.batch, self.length, _ = shape
        self.q_chunk, self.k_chunk = sizes
        # rows of the batch at once: a tile holds about q_chunk rows in all
        tile = min(self.length, self.q_chunk)
        self.b_chunk = min(self.batch, max(1, self.q_chunk // tile))
        # rows through the MLP at once, in all
        few = few_launches(device, training)
        self.m_chunk = self.q_chunk if few else mlp_rows(self.b_chunk * tile, device.type, training)
        # nor is there anything to gain from parts where a tile holds whole sequences
        self.whole = few and block.config.checkpoint_layers and self.length <= self.q_chunk
        # cuDNN builds a plan for each shape: worth it where all tiles but the last are alike
        self.fixed_shapes = self.q_chunk % self.k_chunk == 0 and (
            self.length > self.q_chunk or self.length % 128 == 0
        )

    def batches(self):
        return [slice(b, b + self.b_chunk) for b in range(0, self.batch, self.b_chunk)]

    def row_tiles(self):
        """(start, stop) of the tiles, last to first."""
        return [
            (a, min(a + self.q_chunk, self.length))
            for a in reversed(range(0, self.length, self.q_chunk))
        ]

    def mlp_tiles(self, start, stop, batch_rows):
        """(start, stop) of the MLP's smaller tiles inside one row tile."""
        step = max(1, self.m_chunk // batch_rows)
        return [(a, min(a + step, stop)) for a in range(start, stop, step)]

    def positions(self, start, count):
        return torch.arange(start, start + count, device=self.device)

    def head_slices(self):
        """Ranges (first, stop) of the key/value heads whose attention's backward runs at once;
        [None] for all of them."""
        G = self.block.config.kv_heads
        n = heads_at_once(
            self.block.config, self.length, self.q_chunk, self.b_chunk, self.device.type
        )
        return [None] if n == G else [(a, a + n) for a in range(0, G, n)]

    def by_head(self, x):
        """Rows of attention's output as the kernels want them: (b, t, C) -> (b, H, t, D)."""
        return x.unflatten(-1, (-1, self.block.config.head_dim)).transpose(1, 2)

    def qkv(self, x, start, heads=None):
        """x (b, t, C): rows from `start` -> q (b, H, t, D), k, v (b, G, t, D), of all heads or of
        key/value heads [first, stop) and their queries."""
        return self.block.norm_qkv(x, self.positions(start, x.size(1)), heads)

    def q(self, x, start, heads=None):
        return self.block.norm_q(x, self.positions(start, x.size(1)), heads)

    def kv(self, x, start, heads=None):
        return self.block.norm_kv(x, self.positions(start, x.size(1)), heads)

    def finish(self, x, out, start, batch_start):
        """Output projection, residual, MLP, residual, with the dropout of exactly this tile."""
        with self._dropout_seed(start, batch_start):
            return self.block.finish(x, out)

    def plain(self, x, batch_start):
        """The plain block over whole sequences x (b, T, C), where `whole`."""
        with self._dropout_seed(0, batch_start):
            return self.block.plain(x)

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
    policy = tiles.block.config.attention_policy
    for batch in tiles.batches():
        xb, yb = x[batch], into[batch]
        source = row_source(policy, tiles.kv, xb, tiles.k_chunk)
        for start, stop in tiles.row_tiles():
            out, lse = attend_rows(
                tiles.q(xb[:, start:stop], start), source, start, stop, tiles.fixed_shapes
            )
            if keep is not None:
                keep(batch, start, stop, out, lse)
            for a, b in tiles.mlp_tiles(start, stop, len(xb)):
                yb[:, a:b] = tiles.finish(
                    xb[:, a:b], out[:, :, a - start : b - start], a, batch.start
                )
            del out, lse  # before the next tile's are made
        del source  # its K and V, before the next sequences' are made


def fill_cache(block, x, layer):
    """Store what one layer of a KV cache needs of a prompt's input x (B, T, C), by tiles."""
    sizes = tile_sizes(block.config, x.size(1), x.device.type)
    tiles = Tiles(block, x.shape, x.device, sizes)
    for batch in tiles.batches():
        for start in range(0, x.size(1), tiles.k_chunk):
            rows = x[batch, start : start + tiles.k_chunk]
            if layer.needs == "x":
                layer.append(None, None, block.ln_1(rows), start=start, batch=batch)
            else:
                layer.append(*tiles.kv(rows, start), None, start=start, batch=batch)


def run_block(block, x, inplace=False):
    """The block over x (B, T, C) by tiles -> (B, T, C); over x itself if `inplace`.

    inplace is honoured only while no gradient is recorded. Raises UserError for attention
    dropout, which tiles cannot replay.
    """
    config = block.config
    sizes = tile_sizes(config, x.size(1), x.device.type)
    dropping = block.training and config.dropout > 0
    if block.attention_dropout > 0:
        raise UserError(
            "attention dropout cannot be replayed tile by tile: set "
            "--attention_dropout=0 (residual dropout stays), or --dropout=0"
        )
    if torch.is_grad_enabled():
        parameters = tuple(block.parameters())
        return _TiledBlock.apply(x, block, sizes, dropping, *parameters)
    into = x if inplace else torch.empty_like(x)
    forward_tiles(Tiles(block, x.shape, x.device, sizes), x, into)
    return into


class _TiledBlock(torch.autograd.Function):
    """A block whose backward recomputes its tiles. Parameters are inputs, so that DDP's hooks,
    autograd.grad and gradient accumulation see them as they would in the plain block."""

    @staticmethod
    @graph_break
    def forward(ctx, x, block, sizes, dropping, *parameters):
        device = x.device
        seed = int(torch.randint(2**40, ())) if dropping else None
        ctx.tiles = tiles = Tiles(block, x.shape, device, sizes, seed, training=True)
        ctx.autocast = _autocast_state(device.type)
        config = block.config
        B, T, C = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        ctx.out_dtype = ctx.autocast["dtype"] if ctx.autocast["enabled"] else x.dtype
        out = lse = None
        if not tiles.whole:
            lse = torch.empty(B, config.n_head, T, dtype=wide, device=device)
        if not config.checkpoint_layers:
            out = torch.empty(B, T, C, dtype=ctx.out_dtype, device=device)

        def keep(batch, start, stop, tile_out, tile_lse):
            lse[batch, :, start:stop] = tile_lse
            if out is not None:
                out[batch, start:stop] = tile_out.transpose(1, 2).flatten(2)

        ctx.host_x = stash(x) if config.offload else None  # first: the tiles hide its time
        y = torch.empty_like(x)
        if tiles.whole:
            for batch in tiles.batches():
                y[batch] = tiles.plain(x[batch], batch.start)
        else:
            forward_tiles(tiles, x, y, keep)
        ctx.save_for_backward(None if config.offload else x, lse, *parameters)
        ctx.out = out  # not saved: backward writes over it, and a second one recomputes it
        return y

    @staticmethod
    @graph_break
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, lse, *parameters = ctx.saved_tensors
        if ctx.host_x is not None:
            x = fetch(ctx.host_x)
        out, ctx.out = ctx.out, None
        weights = ParameterGradients(parameters, ctx.needs_input_grad[4:])
        with torch.autocast(**ctx.autocast):
            if ctx.tiles.whole:
                grad_x = backward_whole(ctx.tiles, x, grad, weights)
            else:
                grad_x = backward_tiles(ctx.tiles, x, lse, out, ctx.out_dtype, grad, weights)
        return (grad_x, None, None, None, *(weights.total(p) for p in parameters))


def _autocast_state(device_type):
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
    }
