"""Predicting memory: the peak of a forward pass or a training step by formula, before it is run.

Unit: one residual stream, T rows of C numbers for each of B sequences. H/G = g, inner/C = r.

                     without gradients            saved for backward, each layer
  plain              x and 2 + 2 r (or 3 + 2/g)   6 + 2/g + 2 r
  tiled              x; cache, grouped: + 2/g     x, attention's output
  checkpoint_layers                               x
  offload                                         (x on the host; two of them on their way)

and the logsumexp, B H T float32 numbers a layer. On top of the streams come one tile's scratch,
the gradients, and one chunk of logits. tests/memory/test_memory_plan.py holds the formulas against
measured peaks. What a formula leaves out (kernels' workspaces, allocator rounding) is why
`advise_oom` keeps a tenth in reserve.
"""

from dataclasses import replace

import torch

from leangpt.attention.kv_source import MERGED_QUERIES
from leangpt.attention.tile_sizes import default_chunk, heads_at_once, mlp_rows, tile_sizes
from leangpt.layers.loss import chunk_rows

RESERVE = 0.1  # of the memory at hand, left free in advice


def predict_forward_peak(config, B, T, element_size=4, device_type="cpu"):
    """Bytes beyond weights of GPT(config) over (B, T) tokens without gradients, no logits of them.

    element_size: bytes a number of the residual stream (4 float32, 2 bfloat16).
    """
    g, r = _ratios(config)
    sizes = _tiles(config, B, T, device_type, training=False)
    if sizes is None:
        inside = 4 * r if config.mlp == "swiglu" else 2 * r
        stream = B * T * config.n_embd * element_size
        attending = (4 + 2 / g) * stream + _workspace(config, T, device_type)
        return int(max(attending, (3 + inside) * stream))
    b, q, k = sizes
    row = config.n_embd * element_size
    rows = B * T + b * _forward_scratch(config, T, q, k, device_type, False, b * row)
    if not config.policy.recomputes:
        rows += 2 / g * T * b
    return int(rows * row)


def predict_block_peak(config, B, T, element_size=4, device_type="cpu"):
    """Bytes beyond weights and input of one block over x (B, T, C) without gradients."""
    stream = B * T * config.n_embd * element_size
    return predict_forward_peak(config, B, T, element_size, device_type) - stream


def predict_training_peak(
    config, B, T, element_size=4, device_type="cpu", gradient_size=4, fused_backward=False
):
    """Bytes beyond weights of one forward and backward of GPT(config) over (B, T) tokens.

    Parameter gradients are included, of gradient_size bytes a number, as weights have; with
    fused_backward each is freed as soon as it is complete. Weights and optimizer state are not,
    nor what an update needs for a moment.
    """
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    g, r = _ratios(config)
    sizes = _tiles(config, B, T, device_type, training=True)
    layer_weights = _layer_weights(config)
    row = C * element_size  # bytes of a stream, each token
    lse = 4 * config.n_head
    if sizes is None:
        inside = 5 * r if config.mlp == "swiglu" else 2 * r
        saved = (6 + 2 / g + inside) * row + lse
        # backward of the MLP: the stream's gradient and one as wide as its inside
        working, scratch = (1 + r) * row * B * T, layer_weights * gradient_size
    else:
        b, q, k = sizes
        saved = lse + (0 if config.offload else row if config.checkpoint_layers else 2 * row)
        # gradients of output and input, and the multiple that stands for attention's output
        working = ((2 + 2 * config.offload) * B * row + b * lse) * T
        working += b * row * T if config.checkpoint_layers else 0  # attention's output, again
        scratch = b * _backward_peak(config, T, b, q, k, element_size, device_type)
        scratch += layer_weights * 4 * 4 / 3  # sums, and the MLP's share of one tile's
    workspace = _workspace(config, sizes[1] if sizes else T, device_type)
    head = V * C * 4  # float32 gradient of the tied head, then in the weights' own numbers
    head_kept = V * C * gradient_size
    standing = 0 if fused_backward else (L - 1) * layer_weights * gradient_size
    copies = 1 if device_type == "cuda" else 2  # logits, and what their softmax goes through
    logits = copies * chunk_rows(B * T, V, device_type, element_size) * V * element_size
    all_saved = L * saved * B * T
    in_loss = all_saved + 3 * row * B * T + head + max(logits, head)
    first_backward = all_saved + working + scratch + head_kept
    last_backward = saved * B * T + working + scratch + head_kept + standing
    return int(max(in_loss, first_backward, last_backward) + workspace)


def advise_oom(config, B, T, bytes_available, element_size=4, device_type="cpu", **gradients):
    """One sentence: which policy and tile would have trained (B, T) tokens in that much memory.

    bytes_available: what there is beyond weights and optimizer state; gradients: as
    predict_training_peak's last arguments. Candidates are tried from
    the cheapest in time to the dearest; where none fits, the longest T that would is named.
    """

    def needs(candidate, length=T):
        return predict_training_peak(candidate, B, length, element_size, device_type, **gradients)

    budget = bytes_available * (1 - RESERVE)
    said = (
        f"{B} x {T:,} tokens under {_describe(config)} need about {_size(needs(config))} "
        f"beyond weights and optimizer state, of {_size(bytes_available)} at hand"
    )
    candidates = _cheapest_first(config, T, device_type)
    for candidate in candidates:
        if needs(candidate) <= budget:
            return f"{said}; {_describe(candidate)} would need {_size(needs(candidate))}"
    length = T
    while length > 1 and needs(candidates[-1], length) > budget:
        length //= 2
    if needs(candidates[-1], length) > budget:
        return f"{said}; no policy fits even one token: the model itself is too large"
    return f"{said}; no policy fits. {_describe(candidates[-1])} would fit {B} x {length:,} tokens"


def _cheapest_first(config, T, device_type):
    """Configurations worth trying instead, each slower and smaller than the one before."""
    whole = replace(config, checkpoint_layers=False, offload=False)
    tile = default_chunk(config, device_type)
    rows = [tile] + [n for n in (4096, 1024, 512) if n < tile]
    found = [replace(whole, q_chunk=tile, k_chunk=None)]
    leaner = config.policy.leaner or config.attention_policy
    recompute = replace(whole, attention_policy=leaner, k_chunk=None)
    found += [replace(recompute, q_chunk=n) for n in rows]
    found += [replace(recompute, q_chunk=n, checkpoint_layers=True) for n in rows]
    if device_type == "cuda":
        found += [replace(recompute, q_chunk=n, checkpoint_layers=True, offload=True) for n in rows]
    return [candidate for candidate in found if candidate != config]


def _describe(config):
    """The settings that decide the memory, as they are written on the command line."""
    words = [f"--attention_policy={config.attention_policy}"]
    for name in ("q_chunk", "k_chunk"):
        if getattr(config, name):
            words.append(f"--{name}={getattr(config, name)}")
    words += [
        f"--{name}=True" for name in ("checkpoint_layers", "offload") if getattr(config, name)
    ]
    return " ".join(words)


def _size(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def _ratios(config):
    return config.n_head / config.kv_heads, config.inner / config.n_embd


def _layer_weights(config):
    """Parameters of the linear layers of one block."""
    C, (g, r) = config.n_embd, _ratios(config)
    return (2 + 2 / g + (3 if config.mlp == "swiglu" else 2) * r) * C * C


def _tiles(config, B, T, device_type, training):
    """(b, q, k): sequences and rows of a tile, key rows per tile; None: the plain block."""
    sizes = tile_sizes(config, T, device_type, training)
    if sizes is None:
        return None
    q_chunk, k_chunk = sizes
    return min(B, max(1, q_chunk // min(T, q_chunk))), min(q_chunk, T), min(k_chunk, T)


def _forward_scratch(config, T, q, k, device_type, training, unit=0):
    """Rows of C numbers that a tile of one sequence holds at once: its worst phase.

    unit: bytes of such a row, to count what the attention kernel works in; 0: do not.
    """
    g, r = _ratios(config)
    streams = 2 * q  # queries, and attention merged so far
    if k >= q:  # a first tile has nothing to merge, and there may be few rows after it
        streams = max(q, 2 * min(q, T - q))
    merging = q if T > q else q - k  # rows of attention yet to be merged
    merging = max(min(k, q), min(merging, MERGED_QUERIES) if device_type == "cpu" else merging)
    kernel = _workspace(config, merging, device_type) / unit if unit else 0
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


def _backward_peak(config, T, b, q, k, element_size, device_type):
    """Bytes a sequence that backward's worse phase (block_backward.py) holds for a time."""
    g, r = _ratios(config)
    row = config.n_embd * element_size
    wide = 4 / element_size  # float32 beside numbers of the stream
    kept = 0 if config.policy.recomputes else 2 / g * T
    attending = 0
    if config.checkpoint_layers:
        attending = kept + _forward_scratch(config, T, q, k, device_type, training=True)
    at_once = q if device_type == "cuda" else q / 4
    inside_mlp = kept * config.checkpoint_layers + (3 + 3 * r) * at_once
    heads = heads_at_once(config, T, q, b, device_type)
    share = heads / config.kv_heads
    stored = not config.policy.recomputes or share < 1
    attention = share * (wide + stored) * T  # dq and the queries of some heads
    attention += q + share * ((1 + (4 + 2 * wide) / g) * q + 4 * k)
    return max(attending, inside_mlp, attention) * row


def _workspace(config, rows, device_type):
    """Bytes of the fused CPU kernel over `rows` queries: each thread's scores and a few vectors."""
    if device_type != "cpu":
        return 0
    queries = 256 if rows >= 768 else 64 if rows >= 192 else 32  # as the kernel splits them
    return torch.get_num_threads() * 4 * queries * (512 + 2 + config.head_dim)
