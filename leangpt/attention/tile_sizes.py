"""How large a block's tiles are: arithmetic alone, shared by the loop and by memory's formulas.

What a tiled block takes beyond its input and its output, in rows of C numbers for each of the b
sequences it works on at once (q = q_chunk, k = k_chunk, g = H/G, m rows of an MLP tile, n of the G
key/value heads at once in backward):

    forward   attention, CUDA              3 q + 2 k/g
              attention, CPU               2 q + 4 k/g
              MLP                          q + 11 m
              source that stores           2 T/g, for K and V
    backward  gradient of x                T
              dq                           T n/G, float32
              queries                      T n/G, none where recomputed with n = G

The phases of one pass follow each other, so the most of them counts. m is q/4 or, on the CPU, down
to q/8. leangpt/memory/tiles.py has the same to a few percent.
"""

import torch

from leangpt.attention.protocol import BlockShape
from leangpt.system.errors import UserError

SHORT = 6144  # tokens: training on so few takes no tiles on the CPU


def tile_sizes(
    config: BlockShape, T: int, device_type: str, training: bool | None = None
) -> tuple[int, int] | None:
    """(q_chunk, k_chunk) for a block over T tokens, or None for the plain block.

    training: None: whether gradients are recorded now.
    Recomputing K and V costs C / (g q_chunk) of attention's own arithmetic, g = H/G: q_chunk is
    several times C/g unless given. Training sequences of up to one and a half such tiles, and of
    SHORT tokens on the CPU, run plain: so short, tiles would take 1.3 times plain's time.
    """
    training = torch.is_grad_enabled() if training is None else training
    chunk = default_chunk(config, device_type)
    if training and config.checkpoint_layers:
        q_chunk = config.q_chunk or chunk
    elif config.source.recomputes:
        short = max(3 * chunk // 2, SHORT if device_type == "cpu" else 0)
        if training and config.q_chunk is None and T <= short:
            return None
        q_chunk = config.q_chunk or chunk
    elif config.q_chunk:
        q_chunk = config.q_chunk
    else:
        return None
    return q_chunk, config.k_chunk or min(q_chunk, 16384)


NO_DROPOUT = (
    "attention dropout cannot be replayed tile by tile: set --attention_dropout=0 (residual "
    "dropout stays), or --dropout=0"
)


def check_dropout(config, T: int, device_type: str, in_pieces: bool = False) -> None:
    """Raise UserError for attention dropout where training over T rows goes by tiles.

    in_pieces: are sequences shared among processes?"""
    rate = config.dropout if config.attention_dropout is None else config.attention_dropout
    if rate > 0 and (in_pieces or tile_sizes(config, T, device_type, training=True) is not None):
        raise UserError(NO_DROPOUT)


def sizes_in_pieces(config: BlockShape, T: int, device_type: str) -> tuple[int, int]:
    """The same for a block whose sequence of T rows goes on elsewhere: it always takes tiles."""
    sizes = tile_sizes(config, T, device_type, training=True)
    chunk = default_chunk(config, device_type)
    return sizes or (config.q_chunk or chunk, config.k_chunk or chunk)


def default_chunk(config: BlockShape, device_type: str) -> int:
    """Rows per tile when none are asked for: 8 C/g (CPU) or 16 C/g (CUDA), as a power of two."""
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
