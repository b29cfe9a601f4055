"""The memory of a block by tiles, and of a forward pass: what plan.py's table calls by name.

Unit: one residual stream, T rows of C numbers for each of B sequences. H/G = g, inner/C = r.

                     without gradients
  plain              x and 2 + 2 r (or 3 + 2/g)
  tiled              x; cache, grouped: + 2/g

and one tile's scratch on top. tests/memory/ holds the formulas against measured peaks.
"""

from dataclasses import dataclass

import torch

from leangpt.attention.kv_source import MERGED_QUERIES
from leangpt.attention.tile_sizes import heads_at_once, mlp_rows, sizes_in_pieces, tile_sizes
from leangpt.layers.loss import chunk_rows
from leangpt.layers.mlp_triton import shapes_suit
from leangpt.memory.sums import taking
from leangpt.memory.update import FLOAT


def predict_forward_peak(config, B, T, element_size=4, device_type="cpu"):
    """Bytes beyond weights of GPT(config) over (B, T) tokens without gradients, no logits of them.

    element_size: bytes a number of the residual stream (4 float32, 2 bfloat16).
    """
    g, r = _ratios(config)
    sizes = _tiles(config, B, T, device_type, training=False)
    if sizes is None:
        inside = 4 * r if config.mlp == "swiglu" else 2 * r
        stream = B * T * config.n_embd * element_size
        attending = (4 + 2 / g) * stream
        attending += _workspace(config, T, T, element_size, device_type)
        return int(max(attending, (3 + inside) * stream))
    b, q, k = sizes
    row = config.n_embd * element_size
    rows = B * T + b * _forward_scratch(config, T, q, k, device_type, False, b * row, element_size)
    if not config.policy.recomputes:
        rows += 2 / g * T * b
    return int(rows * row)


def predict_block_peak(config, B, T, element_size=4, device_type="cpu"):
    """Bytes beyond weights and input of one block over x (B, T, C) without gradients."""
    stream = B * T * config.n_embd * element_size
    return predict_forward_peak(config, B, T, element_size, device_type) - stream


PROCESSORS = 132  # of an H100
L2_CACHE = 50 << 20  # of an H100, bytes


@dataclass(frozen=True)
class Sizes:
    """A block's tiles: sequences at once, rows of queries, rows of keys; does one hold it whole?

    tile: rows of queries before a piece of a sequence cut them (q is then of one of two runs)."""

    b: int
    q: int
    k: int
    whole: bool
    tile: int


def of_run(run):
    """Sizes of a Run's tiles, or None for the plain block."""
    config, T = run.config, run.rows
    if run.context_parallel > 1:
        q_chunk, k_chunk = sizes_in_pieces(config, T, run.device_type)
        b = min(run.batch_size, max(1, q_chunk // min(T, q_chunk)))
        q = -(-(T // 2) // -(-(T // 2) // max(1, q_chunk // 2)))
        return Sizes(b, q, min(k_chunk, T), False, min(q_chunk, T))
    found = _tiles(config, run.batch_size, T, run.device_type, training=True)
    if found is None:
        return None
    q_chunk = tile_sizes(config, T, run.device_type, True)[0]
    whole = run.device_type == "cuda" and config.checkpoint_layers and T <= q_chunk
    return Sizes(*found, whole, found[1])


def logit_rows(run):
    """Rows whose logits the loss makes at once."""
    size, V = run.stream_bytes, run.config.vocab_size
    return min(run.tokens, chunk_rows(run.tokens, V, run.device_type, size))


def working(run, names, tiles):
    """What a block's backward takes for a moment: `working` for activations, `working_weights`,
    the `workspace` of a kernel, and `working_update` for weights that move meanwhile; bytes, of the
    worst of its phases."""
    phases = plain_phases(run, names) if tiles is None else tiled_phases(run, names, tiles)
    names = ("working", "working_weights", "workspace", "working_update")
    return dict(zip(names, (*max(phases, key=sum), 0)))


def plain_phases(run, names):
    """Phases of the plain block's backward: (activations, weights, workspace, update where weights
    move in it) beyond SAVED.

    First the MLP, where gradients inside it join all that was saved; then attention, when the
    MLP's activations are gone again.
    """
    config, g, r, e = run.config, names["g"], names["r"], run.stream_bytes
    stream = run.tokens * config.n_embd * e
    swiglu, matrix = names["swiglu"], config.n_embd**2
    inside = inside_mlp(run, names)
    stands = names["accumulates"] and not names["freed"]  # the gradient that others are added to
    made = max(e if names["cast"] else run.param_bytes, 0 if stands else run.param_bytes)
    mlp_saved = (1 + names["mlp_parts"] * r) * stream + names["norm_more"]
    wide = 4 / e if names["wide"] or names["scores"] else 1
    attention = (2 + 2 * wide * (1 + 2 / g)) * stream - mlp_saved
    attention += names["scores"] * 4 * run.batch_size * config.n_head * run.length**2
    done = (3 if swiglu else 2) * r * matrix * run.param_bytes
    done = 0 if names["accumulates"] or run.gradient_bits else done
    T, size = run.length, 4 if names["wide"] else e
    workspace = _workspace(config, T, T, size, run.device_type, run.threads, backward=True)
    summed = biased(run) * sum_scratch(run.tokens, config.n_embd)  # of c_proj's bias
    phases = [(inside, r * matrix * made, summed)]
    phases.append((attention, done + matrix * run.param_bytes, workspace))
    if biased(run):
        wide_mlp = (2 if swiglu else 1) * r
        summing = inside + stream - names["mlp_parts"] * r * stream
        scratch = sum_scratch(run.tokens, int(wide_mlp * config.n_embd))
        phases.append(
            (summing, (0 if names["freed"] else done) + wide_mlp * matrix * made, scratch)
        )
    if names["freed"]:  # each gradient is used as soon as it is there: what was saved is less then
        gone = names["mlp_parts"] * r * stream
        alive = {
            "mlp.c_proj": (1 + names["drop"]) * stream,  # and its input's gradient for its input
            "mlp.c_fc": stream - gone,
            "attn.c_proj": 2 * stream - mlp_saved,
            "attn.c_attn": 2 * stream - mlp_saved,
        }
        found = {t.name.rpartition(".h.0.")[2].removesuffix(".weight"): t for t in run.tensors}
        copies = 0  # of weights as the products read them: gone with their product's backward
        for of, activations in alive.items():
            copies += names["cast"] * e * found[of].numbers
            phases.append((activations - copies, found[of].bytes, 0, taking(run, [found[of]])))
    return phases


def inside_mlp(run, names):
    """Bytes of the gradients inside the MLP of the plain block."""
    r = names["r"] * (2 if names["swiglu"] else 1)
    return (1 + names["drop"] + r) * run.tokens * run.config.n_embd * run.stream_bytes


def whole_phases(run, names, tiles):
    """Phases where a tile holds whole sequences, some of the batch: the plain block once more
    (block_backward.backward_whole), whose parameters' gradients are added up in float32."""
    config, e = run.config, run.stream_bytes
    stream, layer = run.tokens * config.n_embd * e, names["layer"]
    copies = names["cast"] * e * layer
    block = names["plain"] - copies  # its input stands for its output
    if run.compiled:
        block += 2 * names["swiglu"] * names["r"] * stream
    elif not fused_mlp(run, tiles.b * run.length):
        block += inside_mlp(run, names) - stream
    held = (2 + config.offload) * stream  # gradients; an input that came back
    first = names["r"] * config.n_embd**2 * (e if names["cast"] else run.param_bytes)
    found = 4 if names["cast"] else run.param_bytes
    phases, b = [], tiles.b
    for sequences, sums in ((b, 0), (min(b, run.batch_size - b), 4 * layer)):
        if not sequences:
            break
        share = sequences / run.batch_size
        scratch = biased(run) * sum_scratch(sequences * run.length, config.n_embd)
        phases.append((held + share * block + copies, sums + first, scratch))
        # float32 ones are their own sums
        handed = found if sums or found < 4 else 0
        phases.append((held, layer * (4 + handed) + copies, 0))
    return phases


def fused_mlp(run, rows):
    """Is the MLP of so many rows one kernel of ours (layers/mlp_triton.supports)?"""
    config = run.config
    if run.device_type != "cuda" or run.stream_bytes != 2 or config.bias or config.mlp == "swiglu":
        return False
    return shapes_suit(rows, config.inner, config.n_embd)


def biased(run):
    """Are gradients of biases PyTorch's sums over rows on a GPU?"""
    return run.config.bias and run.device_type == "cuda" and not run.compiled


def sum_scratch(rows, columns):
    """Bytes that PyTorch's sum over rows (rows, columns) -> (columns,) sets aside on a GPU, where
    it is split over processors: as ATen/native/cuda/Reduce.cuh chooses, 4 columns a thread."""
    width = min(1 << (max(1, columns // 4).bit_length() - 1), 32)
    height = min(1 << (max(1, rows).bit_length() - 1), 128 // width)
    each = -(-rows // height)  # rows of a thread
    blocks = -(-columns // (4 * width))
    most = PROCESSORS * (2048 // (width * height))  # blocks that run at once
    if each < 256 or blocks > most:
        return 0
    split = max(min(-(-most // blocks), -(-each // 16)), -(-each // 256))
    return 4 * columns * split * width * 4 if split > 1 else 0


def tiled_phases(run, names, tiles):
    """Phases of the backward by tiles (attention/block_backward.py), likewise."""
    config, T, r, g, e = run.config, run.rows, names["r"], names["g"], run.stream_bytes
    b, q, k = tiles.b, tiles.q, tiles.k
    row, width = config.n_embd * e, config.n_embd
    copies = names["cast"] * e  # weights as autocast's products read them
    qkv = (1 + 2 / g) * width**2
    after = names["layer"] - qkv  # numbers of the weights after attention
    wide_mlp = (2 if names["swiglu"] else 1) * r
    largest = wide_mlp * width**2
    found = run.param_bytes if not names["cast"] else 4
    if tiles.whole:
        return whole_phases(run, names, tiles)
    # gradients of input and output, the multiple that stands for attention's output
    held = (2 + config.offload) * run.tokens * row + 4 * b * config.n_head * T
    held += b * T * row if config.checkpoint_layers else 0  # attention's output, again
    kept = 0 if config.policy.recomputes else 2 / g * T * b * row
    rows = min(tiles.tile if few(run) else max(1, tiles.tile // 4), q) * b
    inside = 4 + (6 if names["swiglu"] else 3) * r + 3 * names["drop"]
    norm = names["norm_more"] / (run.tokens * row)
    if names["rms"] and e < 4:
        inside = max(inside, 9 * 4 / e + 2)  # the norm's own backward, in float32
    phases = []
    several = run.tokens > rows
    earlier = 4 * qkv * (run.batch_size > b)  # summed over the sequences before
    # a product's own in a CPU's bfloat16: its sums in float32, or its weights once more
    own = largest * (e if copies else 4) if e < 4 and run.device_type == "cpu" else 0
    weights = after * (4 + several * found + copies) + earlier + own
    mlp = held + kept * config.checkpoint_layers + (inside + norm) * rows * row
    phases.append((mlp, weights, 0))
    if biased(run):
        phases.append(
            (mlp - 2 * wide_mlp * rows * row, weights, sum_scratch(rows, int(wide_mlp * width)))
        )
    pieces = run.context_parallel > 1
    if config.checkpoint_layers:
        attending = kept + b * row * _forward_scratch(config, T, q, k, run.device_type, True)
        if pieces:
            attending = kept + b * row * ring_forward(run, tiles)
        workspace = _workspace(config, q, k, e, run.device_type, run.threads)
        workspace += scores(run, tiles, 3)
        phases.append((held + attending, several * after * (4 + copies) + earlier, workspace))
    heads = heads_at_once(config, T, tiles.tile, b, run.device_type)
    share = heads / config.kv_heads
    wide = 4 / e  # float32 beside numbers of the stream
    stored = not config.policy.recomputes or share < 1
    made = 1 + 2 / g + names["rope"] * (1 + 1 / g)  # q, k, v of a tile, and turned
    if few(run):
        made += (2 + 2 * wide) / g + 4 * k / q
    else:  # the diagonal: out, dq, dk, dv; the rows below: these and the sums of dk and dv
        below = min(k, max(0, T - q)) / q
        made += max(2 + 2 / g, (2 + 2 * wide) / g + (3 - stored) * below)
    sums = share * pieces * (2 * wide / g) * T  # dk and dv that come from other processes
    if pieces:
        kept = 0 if config.policy.recomputes else 2 / g * share * T
        ring = kept + sums + share * (wide + stored) * T
        ring += ring_backward(run, tiles, share)
        workspace = _workspace(config, q, k, e, run.device_type, run.threads, backward=True)
        phases.append((held + b * row * ring, after * (4 + copies), workspace))
    attention = share * (wide + stored) * T + sums  # dq and the queries of some heads
    attention += (1 + share * made + names["rope"] * config.head_dim * wide / config.n_embd) * q
    summed = 4 * qkv * (few(run) or run.tokens > q * b)  # of tiles before
    weights = after * (4 + copies) + qkv * copies + summed
    workspace = _workspace(config, q, k, e, run.device_type, run.threads, backward=True)
    workspace += share * scores(run, tiles, 4)
    phases.append((held + b * row * attention, weights, workspace))
    if names["rope"]:  # turned back: a float32 copy, and four of halves
        turning = 3 + 5 / g + 2 * wide / g + 3 * wide + (e < 4) * (1 + 2 / g)
        turning = share * (wide + stored) * T + sums + (1 + share * turning) * q
        phases.append((held + b * row * turning, weights, 0))
    # the backward of the projection to q, k and v, and of the norm before it
    norm = (6 * wide if e < 4 else 4) if names["rms"] else 2
    projecting = sums + share * ((wide + stored) * T + (2 + 4 / g + 2 * wide / g) * q)
    projecting += share * names["rope"] * (1 + 1 / g) * q
    added = qkv * share * found * (run.tokens > q * b)
    scratch = biased(run) * sum_scratch(b * q, int((1 + 2 / g) * width))
    phases.append((held + b * row * (projecting + norm * q), weights + added, scratch))
    if e < 4:  # the gradients of q, k and v are narrow copies, which the product has in one
        projecting += (share * (1 + 2 / g) + 2) * q
        own = qkv * share * (e + 4) * (run.device_type == "cpu")
        phases.append((held + b * row * projecting, weights + own, 0))
    return phases


def ring_forward(run, tiles):
    """Rows of C numbers of attention over other processes' keys (parallel/ring.py): queries of two
    runs and their attention in float32; of keys what has come, what comes and what leaves; of some
    queries what is to be merged."""
    config, wide, piece = run.config, FLOAT / run.stream_bytes, run.rows // 2
    tile = 2 * config.kv_heads / config.n_head * min(tiles.k, piece)
    merging = min(tiles.q, MERGED_QUERIES) if run.device_type == "cpu" else tiles.q
    moving = 3 if slots(run, tiles) > 2 else 2
    return 2 * tiles.q * (1 + wide) + (1 + moving) * tile + (1 + wide) * merging


def ring_backward(run, tiles, share):
    """The same of the way back, for a share of the heads: beside keys, float32 gradients of what
    is visited, of what was visited before and goes back, and of what comes back."""
    config, wide, piece = run.config, FLOAT / run.stream_bytes, run.rows // 2
    tile = 2 * config.kv_heads / config.n_head * share * min(tiles.k, piece)
    # keys of a later process meet the late piece alone, those of an earlier one both, half as often
    later, earlier = (3 + 3 * wide, 2 + 2 * wide)
    if slots(run, tiles) == 2:
        later, earlier = (max(1 + 3 * wide, 2 + wide), 2 + wide)
    return (
        max(later * tile + 3 * share * min(tiles.k, piece), earlier * tile + 3 * share * tiles.k)
        + tile
    )


def slots(run, tiles) -> int:
    """In how many parts other processes' keys come, at most."""
    return 2 * (run.context_parallel - 1) * -(-(run.rows // 2) // min(tiles.k, run.rows // 2))


def scores(run, tiles, times):
    """Bytes of attention's scores in a tile, so many `times`, where they are written out: CUDA's
    kernels for tiles are for narrow numbers (attention/tile_kernels.py)."""
    if run.device_type != "cuda" or run.stream_bytes < 4:
        return 0
    return times * tiles.b * run.config.n_head * tiles.q * max(tiles.q, tiles.k) * 4


def few(run):
    """Are tiles of the MLP as large as others (tile_sizes.few_launches)?"""
    return run.device_type == "cuda"


def _ratios(config):
    return config.n_head / config.kv_heads, config.inner / config.n_embd


def _tiles(config, B, T, device_type, training):
    """(b, q, k): sequences and rows of a tile, key rows per tile; None: the plain block."""
    sizes = tile_sizes(config, T, device_type, training)
    if sizes is None:
        return None
    q_chunk, k_chunk = sizes
    return min(B, max(1, q_chunk // min(T, q_chunk))), min(q_chunk, T), min(k_chunk, T)


def _forward_scratch(config, T, q, k, device_type, training, unit=0, size=4):
    """Rows of C numbers that a tile of one sequence holds at once: its worst phase.

    unit: bytes of such a row, to count what the attention kernel works in, numbers of `size` bytes;
    0: do not.
    """
    g, r = _ratios(config)
    streams = 2 * q  # queries, and attention merged so far
    if k >= q:  # a first tile has nothing to merge, and there may be few rows after it
        streams = max(q, 2 * min(q, T - q))
    merging = q if T > q else q - k  # rows of attention yet to be merged
    merging = max(min(k, q), min(merging, MERGED_QUERIES) if device_type == "cpu" else merging)
    kernel = _workspace(config, merging, k, size, device_type) / unit if unit else 0
    making = keys = 0
    if config.policy.recomputes:
        keys = 2 / g * k
        making = (1 + 2 / g) * k  # the normed rows, and K and V
        if device_type == "cpu":
            making = max(making, 2 * keys)  # or K and V, and them head by head
    attending = streams + max(making, merging + keys + kernel)
    inside_mlp = q + (2.4 + 2 * r) * mlp_rows(q, device_type, training)
    filling = 0 if config.policy.recomputes else (1 + 2 / g) * k
    return max(attending, inside_mlp, filling)


def _workspace(config, queries, keys, size, device_type, threads=None, backward=False):
    """Bytes that the fused CPU kernel works in, `queries` rows of numbers of `size` bytes over
    `keys`: each thread's scores, in backward their gradients too, once more where they are narrow;
    and then what its products pack, fitted to measurements (the last term).
    """
    if device_type != "cpu":
        return 0
    rows = 256 if queries >= 768 else 64 if queries >= 192 else 32  # as the kernel splits them
    keys_at_once = min(512, keys)
    scores = rows * keys_at_once
    narrow = (2 + 2 * backward) * scores if size < 4 else 0
    if narrow and backward:
        narrow += 1.07 * scores + keys_at_once * (50 + 2 * config.head_dim)
    wide = 8 * scores if backward else 4 * (scores + rows * (2 + config.head_dim))
    return (threads or torch.get_num_threads()) * (wide + narrow)
