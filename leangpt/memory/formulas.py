"""The memory of a training step, as a table: every line is a part, what it is, and its bytes.

A step's memory is the most of a few *moments*. A moment is the sum of its lines; a line belongs to
a part that plans show. Formulas are written once, here. What they are made of (`sizes`):

    B T n     sequences, tokens of each, B T            C H G D L V   as everywhere
    g r       H/G; width inside the MLP over C          I             that width
    w e       bytes of a weight or gradient; of a number of the residual stream (autocast's)
    cast      1 where the products' weights are copies of e bytes: w > e
    K         the layers that are checkpointed, the first ones, where not all are; else L
    R         rows whose logits exist at once           layer         numbers in a layer's weights
    yes/no    swiglu rms rope learned tied drop scores (attention dropout) tiled checkpoint offload
              whole (a tile holds whole sequences) fused accumulates ddp cpu
              freed (gradients, as soon as they are there: fused, or summed in few bits)
              spread (a kernel for float32 that does not share heads) copied (heads as rows)
    mlp_parts of I numbers inside the MLP; norm_bytes of a number that the last norm reads; tried:
              what torch.compile times kernels with
    and       weights state gradients: bytes of all; gradients_layer, untied_stands: of a layer's,
              of a head's own; new_layer: of a layer's before they are summed in few bits; at_step,
              update: of the optimizer's step; update_layer, update_head, update_table: of update.py
              or sums.py; tile_scratch, workspace: of tiles.py
"""

from dataclasses import replace

from leangpt.memory import shares, tiles
from leangpt.memory.run import Run
from leangpt.memory.sums import at_step, standing, taking

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "state": "optimizer state",
    "saved": "saved activations",
    "gathered": "weights gathered for a moment",
    "loss": "the loss, for a moment",
    "backward": "backward of a block, for a moment",
    "update": "the update of weights, for a moment",
    "workspace": "workspace of kernels",
    "context": "CUDA's own",
}

NOT_COUNTED = ("weights", "state", "update")  # of predict_training_peak: its caller's

# What one layer keeps for backward.
SAVED = {
    "plain": [
        ("its input x", "n*C*e"),
        ("norm of x, its statistics", "n*C*e + 8*n + norm_more"),
        ("angles of rope", "rope*T*D*4"),
        ("q, k, v", "0 if wide or scores or (spread and rope) else (1 + 2/g)*n*C*e"),
        ("... turned", "rope*(1 if spread else 1 + 1/g)*n*C*e if not (wide or scores) else 0"),
        ("... in float32, where the kernel wants it", "wide*(2 + 2/g)*n*C*4"),
        ("k and v for each head, where the kernel wants it", "spread*2*n*C*e"),
        ("attention's weights, dropped and not", "scores*(3*B*H*T*T*4 + 3*n*C*4)"),
        ("attention's logsumexp", "0 if scores else 4*n*H"),
        ("attention's output", "n*C*e + (rope*copied*n*C*e if not (wide or scores) else 0)"),
        ("x after attention", "n*C*e"),
        ("norm of it, its statistics", "n*C*e + 8*n + norm_more"),
        ("inside the MLP", "mlp_parts*r*n*C*e"),
        ("dropout's masks", "drop*2*n*C*mask"),
        ("weights as the products read them", "cast*e*layer"),
    ],
    "tiled": [
        ("its input x", "0 if offload else n*C*e"),
        ("attention's output", "0 if checkpoint else n*C*e"),
        ("attention's logsumexp", "0 if whole else 4*n*H"),
    ],
}

KEPT = [
    ("weights", "weights", "weights"),
    ("state", "optimizer state", "state"),
    ("saved", "tokens and targets", "16*n"),
    ("saved", "those of whole sequences, and places in them", "whole_tokens"),
    ("workspace", "of cuBLAS, of two handles", "0 if cpu else 2*32*2**20"),
]
SAVED_ALL = [
    ("saved", "the first K layers'", "K*saved"),
    ("saved", "the others'", "(L - K)*last_saved"),
    ("saved", "embeddings' dropout", "drop*n*C*mask"),
    ("saved", "on its way to the host and back", "offload*n*C*e"),
    ("saved", "the last stream, statistics of its norm", "n*C*e + 8*n + last_norm_more"),
]
STANDING = [
    ("gradients", "of earlier micro-batches; in ddp's buckets always", "accumulates*gradients")
]

WORKING = [  # of a block's backward
    ("backward", "its activations' gradients", "working"),
    ("backward", "its weights' gradients", "working_weights"),
    ("update", "for its weights", "working_update"),
    ("workspace", "of attention", "workspace"),
]
WORKING_OF_THE_LAST = [(part, what, f"last_{formula}") for part, what, formula in WORKING]

LAST_CHECKPOINTED = "backward of the last checkpointed block"  # where it is not the last of all
MOMENTS = {
    "the loss": [
        *KEPT,
        *STANDING,
        *SAVED_ALL,
        ("loss", "norm of the stream, and its gradient", "2*n*C*e"),
        ("loss", "targets as they count", "8*n"),
        ("loss", "the head as the product reads it", "cast*V*C*e"),
        ("loss", "the head's gradient", "V*C*4"),
        (
            "loss",
            "logits of some rows",
            "max(R*V*logit, (R*V*2*e + V*C*(e + 4*(n > R))) if half_cpu else 0)",
        ),
    ],
    "the head's gradient": [
        *KEPT,
        *STANDING,
        *SAVED_ALL,
        ("loss", "gradients of the stream, twice", "2*n*C*e"),
        (
            "loss",
            "the head's gradient, and scaled",
            "V*C*(4 + w) + (V*C*4 if w < 4 and cpu else 0)",
        ),
    ],
    "backward of the last norm": [
        *KEPT,
        *STANDING,
        *SAVED_ALL[:-1],
        ("saved", "what it kept", "2*n*C*4 if in_steps else n*C*norm_bytes"),
        ("gradients", "the head's", "V*C*w if tied else untied_stands"),
        ("loss", "gradients between its steps", "4*n*C*4 if in_steps else 2*n*C*norm_bytes"),
    ],
    "the head's update": [
        *KEPT,
        *STANDING,
        *SAVED_ALL,
        ("gradients", "the head's", "(freed and not tied)*V*C*w"),
        ("update", "for the head", "(freed and not tied)*update_head"),
    ],
    "backward of the last block": [
        *KEPT,
        *STANDING,
        *SAVED_ALL[:-1],
        ("gradients", "the head's, where it is the table's too", "tied*V*C*w"),
        *WORKING_OF_THE_LAST,
    ],
    "the first backward of the last block": [  # before there is a state; a GPU's peak is from then
        *(line for line in KEPT if line[0] != "state"),
        (
            "gradients",
            "ddp's buckets; those of micro-batches before the last",
            "ddp*(1 if cpu else min(2, pieces))*gradients",
        ),
        *SAVED_ALL[:-1],
        ("gradients", "the head's, where it is the table's too", "tied*V*C*w"),
        *WORKING_OF_THE_LAST,
        ("workspace", "torch.compile's, to time kernels: an L2 cache", "tried"),
    ],
    LAST_CHECKPOINTED: [
        *KEPT,
        *STANDING,
        ("saved", "the first K layers'", "K*saved"),
        ("saved", "embeddings' dropout", "drop*n*C*mask"),
        ("saved", "on its way to the host and back", "offload*n*C*e"),
        (
            "gradients",
            "of the blocks after it",
            "(0 if fused or accumulates else (L - K)*gradients_layer)",
        ),
        ("gradients", "the head's", "V*C*w if tied else untied_stands"),
        *WORKING,
    ],
    "the update of the last block": [  # whose gradients tiles hand over together
        *KEPT,
        *STANDING,
        ("saved", "the other layers'", "(K - 1)*saved"),
        ("saved", "embeddings' dropout", "drop*n*C*mask"),
        ("gradients", "the head's, where it is the table's too", "tied*V*C*w"),
        ("gradients", "the block's", "(freed and by_tiles)*new_layer"),
        ("backward", "the gradient of its input", "n*C*e"),
        ("update", "for its weights", "(freed and by_tiles)*update_layer"),
    ],
    "backward of the first block": [
        *KEPT,
        *STANDING,
        ("saved", "its own", "saved"),
        ("saved", "embeddings' dropout", "drop*n*C*mask"),
        (
            "gradients",
            "of the blocks after it",
            "(0 if fused or accumulates else (L - 1)*gradients_layer)",
        ),
        ("gradients", "the head's", "V*C*w if tied else untied_stands"),
        *WORKING,
    ],
    "the embeddings' gradient": [
        *KEPT,
        *STANDING,
        ("saved", "embeddings' dropout", "drop*n*C*mask"),
        ("gradients", "of the blocks", "(0 if fused or accumulates else L*gradients_layer)"),
        ("gradients", "the head's", "V*C*w if tied else untied_stands"),
        ("backward", "the stream's", "n*C*e"),
        ("backward", "the table's", "V*C*e + (V*C*w if e < w else 0)"),
        ("backward", "the positions'", "learned*S*C*(w + (e if e < w else 0))"),
    ],
    "the table's update": [
        *KEPT,
        *STANDING,
        ("gradients", "of the blocks", "(0 if fused or accumulates else L*gradients_layer)"),
        ("gradients", "the head's own", "0 if tied else untied_stands"),
        ("gradients", "the table's", "freed*V*C*w"),
        ("backward", "the stream's", "n*C*e"),
        ("update", "for the table", "freed*update_table"),
    ],
    "the optimizer's step": [
        *KEPT,
        ("gradients", "all, or their sums", "0 if fused else at_step"),
        ("update", "for the largest stack of weights", "0 if fused else update"),
    ],
}

MOMENTS_OF_SHARES = {
    name: [*lines, *shares.ADDITIONS.get(name, ())] for name, lines in MOMENTS.items()
} | shares.own_moments(KEPT, STANDING, WORKING)

OF_THE_LAST = "saved working working_weights working_update workspace".split()


def sizes(run) -> dict:
    """The names that formulas are made of, for a Run."""
    if run.shares > 1:
        names = sizes(shares.inside(run))
        return names | shares.sizes(run)
    c, n, e, w = run.config, run.tokens, run.stream_bytes, run.param_bytes
    cpu = run.device_type == "cpu"
    dropout = c.dropout > 0
    attention_dropout = c.dropout if c.attention_dropout is None else c.attention_dropout
    layers = [t for t in run.tensors if t.in_layer]
    tiled = tiles.of_run(run)
    layer = sum(t.numbers for t in layers if len(t.shape) > 1)
    names = dict(
        B=run.batch_size, T=run.rows, n=n, C=c.n_embd, H=c.n_head, G=c.kv_heads, D=c.head_dim,
        L=c.n_layer, V=c.vocab_size, S=c.block_size, g=c.n_head / c.kv_heads, I=c.inner,
        r=c.inner / c.n_embd, w=w, e=e, cast=int(w > e), swiglu=int(c.mlp == "swiglu"),
        rms=int(c.norm == "rmsnorm"), rope=int(c.position == "rope"),
        learned=int(c.position == "learned"), tied=int(c.tie_embeddings), drop=int(dropout),
        scores=int(attention_dropout > 0 and cpu), mask=e if cpu else 1,
        wide=int(cpu and e < 4 and not attention_dropout), half_cpu=cpu and e < 4,
        by_tiles=int(tiled is not None), checkpoint=int(c.checkpoint_layers),
        offload=int(c.offload), K=checkpointed(c),
        copied=int((cpu or e < 4) and c.n_head > 1),
        tried=(run.compiled and not cpu) * tiles.L2_CACHE,
        spread=int(not cpu and e == 4 and c.kv_heads < c.n_head),
        whole=int(tiled is not None and tiled.whole), fused=int(run.fused),
        freed=int(run.fused or run.gradient_bits > 0),
        accumulates=int(run.micro_batches > 1 or run.processes > 1), cpu=int(cpu),
        ddp=int(run.processes > 1), pieces=run.micro_batches,
        R=tiles.logit_rows(run), logit=(4 + 4 if e == 4 else 10) if cpu else e, layer=layer,
        weights=sum(t.bytes * t.count for t in run.tensors),
        state=sum(t.state_bytes * t.count for t in run.tensors),
        gradients=sum(standing(run, t) * t.count for t in run.tensors),
        gradients_layer=sum(standing(run, t) for t in layers),
        new_layer=sum(t.bytes for t in layers),
    )  # fmt: skip
    # the normed rows before their gain; a narrow stream is kept in float32 instead, and they too
    kept_rows = names["rms"] * n * c.n_embd * (cpu or w != e)
    names["norm_more"] = kept_rows * (e if e == 4 else 8 - e)
    # torch has RMSNorm in one kernel for CUDA alone, and for weights of the stream's dtype
    names["in_steps"] = names["rms"] and (cpu or (w > e and not run.compiled))
    names["last_norm_more"] = kept_rows * (e if e == 4 else 8)
    # CUDA's autocast has LayerNorm read and write float32; compiled blocks keep what they read
    in_float32 = (not cpu and e < 4 and c.norm == "layernorm") * n * c.n_embd * 4
    names["norm_more"] += in_float32 / 2 * (not run.compiled)
    names["last_norm_more"] += in_float32
    names["norm_bytes"] = 4 if in_float32 else e
    # gate and up, silu of gate, their product; compiled ones compute silu again
    names["mlp_parts"] = (3 if run.compiled and not cpu else 4) if names["swiglu"] else 2
    heads = [t for t in run.tensors if t.name.startswith("lm_head")]
    tables = [t for t in run.tensors if ".wte." in t.name]
    pieces = run.context_parallel > 1
    names["whole_tokens"] = pieces * (16 * run.batch_size * run.length + 8 * run.rows)
    names["at_step"], names["update"] = at_step(run)
    names |= dict(
        update_layer=taking(run, layers),
        update_head=taking(run, heads),
        update_table=taking(run, tables),
    )
    # of a head of its own, after its backward, beside what stands from earlier micro-batches
    gone = names["fused"] or names["accumulates"]
    names["untied_stands"] = 0 if gone else sum(standing(run, t) for t in heads)
    kept = {how: sum(value(f, names) for _, f in lines) for how, lines in SAVED.items()}
    names |= kept | {"saved": kept["plain" if tiled is None else "tiled"]}
    names |= tiles.working(run, names, tiled)
    last = names
    if c.n_layer != names["K"]:
        whole = replace(c, checkpoint_layers=False, checkpoint_first=None, offload=False)
        last = sizes(replace(run, config=whole))
    return names | {f"last_{name}": last[name] for name in OF_THE_LAST}


def value(formula: str, names: dict) -> float:
    """Bytes of a formula of this file."""
    return eval(_compiled(formula), {"__builtins__": {}, "max": max, "min": min}, names)


_code = {}


def _compiled(formula):
    if formula not in _code:
        _code[formula] = compile(formula, "<formula>", "eval")
    return _code[formula]


def moments(run) -> dict[str, dict[str, int]]:
    """Of each moment of a step the bytes of its parts, those that are not 0."""
    names, found = sizes(run), {}
    table = MOMENTS_OF_SHARES if run.shares > 1 else MOMENTS
    for moment, lines in table.items():
        if moment == LAST_CHECKPOINTED and names["K"] == names["L"]:
            continue
        if moment in shares.OF_INNER_BLOCKS and names["L"] < 3:
            continue
        parts = found[moment] = {}
        for part, _, formula in lines:
            if size := int(value(formula, names)):
                parts[part] = parts.get(part, 0) + size
    return found


def peak(run) -> tuple[str, dict[str, int]]:
    """(moment, its parts) of the most memory a step takes."""
    found = moments(run)
    name = max(found, key=lambda moment: sum(found[moment].values()))
    return name, found[name]


def checkpointed(config) -> int:
    """How many layers keep their input alone, where any do: the first ones."""
    return getattr(config, "checkpoint_first", None) or config.n_layer


def host_bytes(run) -> int:
    """Pinned host memory that offloaded layers' inputs take."""
    c = run.config
    return c.offload * checkpointed(c) * run.tokens * c.n_embd * run.stream_bytes


def predict_training_peak(
    config, B, T, element_size=4, device_type="cpu", gradient_size=4, fused_backward=False
):
    """Bytes beyond weights of one forward and backward of GPT(config) over (B, T) tokens.

    Parameter gradients are included, of gradient_size bytes a number, as weights have; with
    fused_backward each is freed as soon as it is complete. Weights and optimizer state are not,
    nor what an update needs for a moment.
    """
    options = {"fused_backward": True} if fused_backward else {}
    run = Run(
        config,
        B,
        T,
        variant="adamsn8",
        options=options,
        param_bytes=gradient_size,
        stream_bytes=element_size,
        device_type=device_type,
    )
    return max(
        sum(size for part, size in parts.items() if part not in NOT_COUNTED)
        for parts in moments(run).values()
    )
