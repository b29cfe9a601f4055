"""A transformer block one row tile at a time, exact forward and exact backward.

Output rows [i, j) of a block depend on the input rows [0, j) only. So a tile of q_chunk rows
goes through the whole block at once (norm, queries, attention over a KV source, projection,
residual, MLP) and nothing but the residual stream is ever as long as the sequence. Tiling
attention alone would move nothing: an untiled MLP is the peak under every policy.

Forward without gradients takes the tiles last to first, so that each may overwrite its own rows
of x: L layers need one residual stream. Backward takes them last to first too: once tile i is
done, every row that attends to rows i has been seen, so dk and dv of tile i are complete.

Training saves x, the rows' logsumexp and (unless checkpoint_layers) attention's output; all
else is recomputed tile by tile (Chen et al. 2016, arXiv 1604.06174, at the grain of a tile).

Extra memory beyond x and the output, in numbers (b rows of the batch at once, q = q_chunk,
k = k_chunk, G D = C/g):  forward  b (3 q C + 2 k C/g + 11 m C), m = q/4 the rows of an MLP tile;
`cache` and `grouped` add 2 T C/g for K and V;  backward adds 2 T C/g float32 for dk and dv.
"""

from contextlib import nullcontext

import torch

# torch.compiler.disable, but torch._dynamo is imported at the first call: 2 s off every start
from torch._compile import _disable_dynamo as graph_break

from attention_kernels import match_layout, tile_backward
from attention_policies import attend_rows, key_tiles, kv_source
from errors import UserError
from offload import fetch, stash


def tile_sizes(config, T, device_type, training=None):
    """(q_chunk, k_chunk) for a block over T tokens, or None for the plain block.

    Recomputing K and V costs C / (g q_chunk) of attention's own arithmetic, g = H/G: q_chunk is
    several times C/g unless given. Training sequences that fit such a tile run plain: there is
    nothing to their left that could be recomputed.
    """
    training = torch.is_grad_enabled() if training is None else training
    chunk = default_chunk(config, device_type)
    if training and config.checkpoint_layers:
        q_chunk = config.q_chunk or chunk
    elif config.attention_policy == "recompute":
        if training and config.q_chunk is None and T <= chunk:
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


class Tiles:
    """One block's row tiles over x (B, T, C): how each part of it is computed."""

    def __init__(self, block, shape, device, sizes, seed=None, training=False):
        self.block, self.device, self.seed = block, device, seed
        self.batch, self.length, _ = shape
        self.q_chunk, self.k_chunk = sizes
        # rows of the batch at once: a tile holds about q_chunk rows in all
        tile = min(self.length, self.q_chunk)
        self.b_chunk = min(self.batch, max(1, self.q_chunk // tile))
        # rows through the MLP at once, in all: a CUDA device wants few launches while training
        few = device.type == "cuda" and training
        self.m_chunk = self.q_chunk if few else max(1, self.b_chunk * tile // 4)
        # cuDNN builds a plan for each shape: worth it where all tiles but the last are alike
        self.fixed_shapes = self.q_chunk % self.k_chunk == 0 and (
            self.length > self.q_chunk or self.length % 128 == 0)

    def batches(self):
        return [slice(b, b + self.b_chunk) for b in range(0, self.batch, self.b_chunk)]

    def row_tiles(self):
        """(start, stop) of the tiles, last to first."""
        return [(a, min(a + self.q_chunk, self.length))
                for a in reversed(range(0, self.length, self.q_chunk))]

    def mlp_tiles(self, start, stop, batch_rows):
        """(start, stop) of the MLP's smaller tiles inside one row tile."""
        step = max(1, self.m_chunk // batch_rows)
        return [(a, min(a + step, stop)) for a in range(start, stop, step)]

    def positions(self, start, count):
        return torch.arange(start, start + count, device=self.device)

    def qkv(self, x, start):
        """x (b, t, C): rows from `start` -> q (b, H, t, D), k, v (b, G, t, D)."""
        return self.block.norm_qkv(x, self.positions(start, x.size(1)))

    def q(self, x, start):
        return self.block.norm_q(x, self.positions(start, x.size(1)))

    def kv(self, x, start):
        return self.block.norm_kv(x, self.positions(start, x.size(1)))

    def finish(self, x, out, start, batch_start):
        """Output projection, residual, MLP, residual, with the dropout of exactly this tile."""
        with self._dropout_seed(start, batch_start):
            return self.block.finish(x, out)

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
        source = kv_source(policy, tiles.kv, xb, tiles.k_chunk)
        for start, stop in tiles.row_tiles():
            out, lse = attend_rows(tiles.q(xb[:, start:stop], start), source, start, stop,
                                   tiles.fixed_shapes)
            if keep is not None:
                keep(batch, start, stop, out, lse)
            for a, b in tiles.mlp_tiles(start, stop, len(xb)):
                yb[:, a:b] = tiles.finish(xb[:, a:b], out[:, :, a - start:b - start], a,
                                          batch.start)
            del out, lse  # before the next tile's are made
        del source  # its K and V, before the next sequences' are made


def fill_cache(block, x, layer):
    """Store what one layer of a KV cache needs of a prompt's input x (B, T, C), by tiles."""
    sizes = tile_sizes(block.config, x.size(1), x.device.type)
    tiles = Tiles(block, x.shape, x.device, sizes)
    for batch in tiles.batches():
        for start in range(0, x.size(1), tiles.k_chunk):
            rows = x[batch, start:start + tiles.k_chunk]
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
        raise UserError("attention dropout cannot be replayed tile by tile: set "
                        "--attention_dropout=0 (residual dropout stays), or --dropout=0")
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
        lse = torch.empty(B, config.n_head, T, dtype=wide, device=device)
        out = None
        if not config.checkpoint_layers:
            dtype = ctx.autocast["dtype"] if ctx.autocast["enabled"] else x.dtype
            out = torch.empty(B, T, C, dtype=dtype, device=device)

        def keep(batch, start, stop, tile_out, tile_lse):
            lse[batch, :, start:stop] = tile_lse
            if out is not None:
                out[batch, start:stop] = tile_out.transpose(1, 2).flatten(2)

        y = torch.empty_like(x)
        forward_tiles(tiles, x, y, keep)
        ctx.host_x = stash(x) if config.offload else None
        ctx.save_for_backward(None if config.offload else x, lse, out, *parameters)
        return y

    @staticmethod
    @graph_break
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, lse, out, *parameters = ctx.saved_tensors
        if ctx.host_x is not None:
            x = fetch(ctx.host_x)
        with torch.autocast(**ctx.autocast):
            return _backward_tiles(ctx.tiles, x, lse, out, grad, parameters, ctx)


def _autocast_state(device_type):
    return {"device_type": device_type, "enabled": torch.is_autocast_enabled(device_type),
            "dtype": torch.get_autocast_dtype(device_type)}


class _ParameterGradients:
    """Sums of parameter gradients over tiles, in float32 or wider."""

    def __init__(self, parameters, needed):
        self.parameters = [p for p, need in zip(parameters, needed) if need]
        self.sums = {}

    def backward(self, outputs, inputs, grads):
        """Gradients of `outputs` for `inputs`; those for the parameters are added up here."""
        found = torch.autograd.grad(outputs, [*inputs, *self.parameters], grads,
                                    allow_unused=True)
        for parameter, grad in zip(self.parameters, found[len(inputs):]):
            if grad is None:
                continue
            if parameter in self.sums:
                self.sums[parameter] += grad
            else:
                self.sums[parameter] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return found[:len(inputs)]

    def total(self, parameter):
        found = self.sums.get(parameter)
        return None if found is None else found.to(parameter.dtype)


def _backward_tiles(tiles, x, lse, out, grad, parameters, ctx):
    """Gradients for forward's inputs: x, three that have none, then the parameters."""
    config = tiles.block.config
    _, T, _ = x.shape
    G, D = config.kv_heads, config.head_dim
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = _ParameterGradients(parameters, ctx.needs_input_grad[4:])
    grad_x = torch.empty_like(x)
    for batch in tiles.batches():
        xb, gb = x[batch], grad[batch]
        source = kv_source(config.attention_policy, tiles.kv, xb, tiles.k_chunk)
        dk = dv = None
        if G == config.n_head and wide == x.dtype:
            # rows of dk are spent just as the same rows of grad_x are written: one buffer
            dk = grad_x[batch].zero_().view(len(xb), T, G, D).transpose(1, 2)
        dk, dv = (torch.zeros(len(xb), T, G, D, dtype=wide, device=x.device).transpose(1, 2)
                  if buffer is None else buffer for buffer in (dk, dv))
        for start, stop in tiles.row_tiles():
            rows = slice(start, stop)
            xt = xb[:, rows].detach().requires_grad_()
            with torch.enable_grad():
                q, k, v = tiles.qkv(xt, start)
            qd, kd, vd = q.detach(), k.detach(), v.detach()
            if out is None:
                tile_out, _ = attend_rows(qd, source, start, stop, tiles.fixed_shapes)
            else:
                tile_out = out[batch, rows].unflatten(-1, (-1, D)).transpose(1, 2)
            tile_lse = lse[batch, :, rows].contiguous()

            # after attention: MLP tile by MLP tile
            tile_out = match_layout(tile_out, qd)
            grad_tile, grad_out = torch.empty_like(xt), torch.empty_like(qd)
            for a, b in tiles.mlp_tiles(start, stop, len(xb)):
                part = slice(a - start, b - start)
                xm = xt.detach()[:, part].requires_grad_()
                om = tile_out[:, :, part].detach().requires_grad_()
                with torch.enable_grad():
                    ym = tiles.finish(xm, om, a, batch.start)
                grad_tile[:, part], grad_out[:, :, part] = weights.backward(
                    [ym], [xm, om], [gb[:, a:b].to(ym.dtype)])
                del xm, om, ym

            # attention: the diagonal, then leftwards
            dq, dk_tile, dv_tile = tile_backward(
                grad_out, qd, kd, vd, tile_out, tile_lse, True, tiles.fixed_shapes)
            dk[:, :, rows] += dk_tile
            dv[:, :, rows] += dv_tile
            del dk_tile, dv_tile
            left = key_tiles(0, start, tiles.k_chunk)
            dq = dq.to(wide) if left else dq
            for a, b in left:
                k_left, v_left = source.rows(a, b)
                dq_tile, dk_tile, dv_tile = tile_backward(
                    grad_out, qd, k_left, v_left, tile_out, tile_lse, False, tiles.fixed_shapes)
                dq += dq_tile
                dk[:, :, a:b] += dk_tile
                dv[:, :, a:b] += dv_tile
                del k_left, v_left, dq_tile, dk_tile, dv_tile  # before the next tile's are made

            del grad_out, tile_out, qd, kd, vd

            # before attention: rows' dk and dv are complete now
            (grad_norm,) = weights.backward(
                [q, k, v], [xt],
                [dq.to(q.dtype), dk[:, :, rows].to(k.dtype), dv[:, :, rows].to(v.dtype)])
            grad_x[batch, rows] = grad_tile + grad_norm
        del source, dk, dv  # before the next sequences' are made
    return (grad_x, None, None, None, *(weights.total(p) for p in parameters))
