"""What a step takes where weights are in shares (parallel=fsdp): lines for formulas.py's table.

A process keeps its rows of every weight, gradient and state, as many as the first one has (FSDP2
pads the others' to that). What is whole for a moment, in numbers of e bytes where it is gathered
and of w where gradients are reduced (float32 masters travel in the stream's dtype, their gradients
are summed in float32):

    tables, head, last norm   from the first block to the end of backward, and as they came until
                              the first block has come; their gradients wait for each other
    a block                   while it runs; beside it, until the next one has come, as it came in
                              forward; in backward the one before it, which is on its way
    a block's gradients       until backward has left it; then, padded, while they are reduced, and
                              until those of the block before are there
    all gradients             where micro-batches add up: they are reduced after the last one alone
                              (or after each: run.py, WHOLE_GRADIENTS)

`block`, `tables`: bytes gathered; `own_layer`, `own_rest`: of whole gradients; `out_layer`,
`out_rest`: of what is reduced; `copies`: of gloo, which gathers and reduces a copy; `loop_layer`,
`loop_rest`: of the last gradient of each, which a loop of FSDP2's holds on to. N: processes.
"""

from dataclasses import replace

from leangpt.memory.run import WHOLE_GRADIENTS
from leangpt.memory.update_shares import update

TABLES = ("gathered", "tables, head and last norm", "tables")
OWN = ("gathered", "the block", "block")
CAME = ("gathered", "the last block, as it came", "block")
NEXT = ("gathered", "the block that is next, on its way", "(L > 1)*block")
REDUCED = ("gradients", "of the block after it, as they were sent", "(L > 1)*out_layer")
ADDED = ("gradients", "... whole no more", "-accumulates*({})*(stood_layer - gradients_layer)")
SENT = ("gradients", "... the block's are let go of", "-accumulates*(own_layer == 0)*stood_layer")


def reduced(blocks):
    """A line: of so many blocks the gradients are reduced, those of earlier micro-batches too."""
    part, what, formula = ADDED
    return part, what, formula.format(blocks)


def copied(prefix="", formula="(L > 1)*block"):
    """A line: gloo's copy of what is gathered before a block runs, where that takes more."""
    running = " - ".join(prefix + name for name in ("working", "working_weights", "workspace"))
    return "gathered", "a copy of gloo's", f"max(0, copies*({formula} + n*C*e) - {running})"


# what is added to moments of formulas.py
ADDITIONS = {
    "the loss": [TABLES, CAME],
    "the head's gradient": [TABLES, OWN],
    "backward of the last norm": [TABLES, OWN],
    "the head's update": [TABLES, OWN],
    "backward of the last block": [TABLES, OWN, NEXT, copied("last_")],
    "backward of the last checkpointed block": [
        TABLES, OWN, NEXT, REDUCED, reduced("L - K"), copied(),
    ],
    "the update of the last block": [TABLES, NEXT],
    "backward of the first block": [TABLES, OWN, REDUCED, reduced("L - 1")],
    "the embeddings' gradient": [
        TABLES, ("gradients", "of the first block, as they were sent", "out_layer"), reduced("L"),
    ],
    "the table's update": [TABLES],
}  # fmt: skip


OF_INNER_BLOCKS = ("backward of the block before the last", "backward of the second block")


def own_moments(kept, standing, working):
    """Moments that there are under fsdp alone, of the lines that formulas.py has for all."""
    dropped = ("saved", "embeddings' dropout", "drop*n*C*mask")
    moving = ("saved", "on its way to the host and back", "offload*n*C*e")
    heads = ("gradients", "the head's", "V*C*w if tied else untied_stands")
    stream = ("backward", "the gradient of its input", "n*C*e")
    last = "(K - 1)*saved if K == L else K*saved + (L - K - 1)*last_saved"
    return {
        "the tables, as they came": [
            *kept,
            *standing,
            TABLES,
            ("gathered", "the same, as they came", "tables"),
            ("gathered", "the first block on its way", "(1 + copies)*block"),
        ],
        "backward of the block before the last": [
            *kept,
            *standing,
            ("saved", "its own and the others'", last),
            dropped,
            moving,
            heads,
            ("gradients", "of the last block", "0 if fused or accumulates else gradients_layer"),
            *((part, what, f"last_{f} if K < L - 1 else {f}") for part, what, f in working),
            TABLES,
            OWN,
            ("gathered", "the block that is next, on its way", "(L > 2)*block"),
            REDUCED,
            reduced("1"),
            copied(formula="(L > 2)*block"),
        ],
        "backward of the second block": [
            *kept,
            *standing,
            ("saved", "its own and the first's", "min(2, K)*saved + (K < 2)*last_saved"),
            dropped,
            moving,
            heads,
            (
                "gradients",
                "of the blocks after it",
                "0 if fused or accumulates else (L - 2)*gradients_layer",
            ),
            *((part, what, f"last_{f} if K < 2 else {f}") for part, what, f in working),
            TABLES,
            OWN,
            NEXT,
            ("gradients", "of the block after it, as they were sent", "(L > 2)*out_layer"),
            reduced("L - 2"),
            copied(),
        ],
        "the last block's gradients, reduced": [
            *kept,
            *standing,
            ("saved", "the other blocks'", last),
            dropped,
            heads,
            stream,
            ("gradients", "the block's", "own_layer"),
            ("gradients", "the same, to be sent", "out_layer"),
            TABLES,
            NEXT,
        ],
        "the last block's gradients, scattered": [
            *kept,
            *standing,
            ("saved", "the other blocks'", last),
            dropped,
            heads,
            stream,
            ("gradients", "the block's, as they were sent", "out_layer"),
            ("gradients", "the same, its own rows", "out_layer/N"),
            SENT,
            ("gradients", "of its last parameter", "loop_layer"),
            ("gradients", "a copy of gloo", "copies*out_layer*(update_layer < copies*out_layer)"),
            ("update", "for its weights", "update_layer*(update_layer >= copies*out_layer)"),
            TABLES,
            NEXT,
        ],
        "the first block's gradients, scattered": [
            *kept,
            *standing,
            dropped,
            heads,
            stream,
            (
                "gradients",
                "of the blocks after it",
                "0 if fused or accumulates else (L - 1)*gradients_layer",
            ),
            ("gradients", "the block's, as they were sent", "out_layer"),
            ("gradients", "the same, its own rows", "out_layer/N"),
            SENT,
            ("gradients", "of its last parameter", "loop_layer"),
            ("gradients", "a copy of gloo", "copies*out_layer*(update_layer < copies*out_layer)"),
            reduced("L - 1"),
            TABLES,
        ],
        "the tables' gradients, reduced": [
            *kept,
            ("gradients", "of the blocks", "0 if fused else L*gradients_layer"),
            ("gradients", "of the tables, head and last norm", "own_rest"),
            ("gradients", "the same, to be sent", "out_rest"),
        ],
        "the tables' gradients, scattered": [
            *kept,
            ("gradients", "of the blocks", "0 if fused else L*gradients_layer"),
            ("gradients", "of the tables, as they were sent", "out_rest"),
            ("gradients", "the same, their own rows", "out_rest/N"),
            ("gradients", "of its last parameter", "loop_rest"),
            ("gradients", "a copy of gloo", "copies*out_rest*(update_rest < copies*out_rest)"),
            ("update", "for the tables", "update_rest*(update_rest >= copies*out_rest)"),
        ],
    }


def inside(run):
    """The Run that a sharded one is to what runs inside of a block: its weights are whole, of the
    stream's dtype, and no gradient is used before backward has left it."""
    options = {name: value for name, value in run.options.items() if name != "fused_backward"}
    apart = run.param_bytes != run.stream_bytes or reduces_each(run)
    return replace(
        run,
        processes=1,
        parallel="none",
        options=options,
        param_bytes=run.stream_bytes,
        micro_batches=1 if apart else run.micro_batches,  # gradients that others are added to
    )


def reduces_each(run) -> bool:
    """Are gradients reduced after every micro-batch (parallel/engine.py)?"""
    if run.device_type != "cuda" or run.device_memory is None:
        return False
    whole = sum(t.count * t.whole for t in run.tensors) * run.param_bytes
    return whole > WHOLE_GRADIENTS * run.device_memory


def whole_of_the_last(run, of) -> int:
    """Numbers of a block's last parameter ("h.0."), or of the last of the model's own ("")."""
    if of:
        names = ("mlp.c_proj.bias", "mlp.c_proj.weight")
    else:
        names = ("lm_head.weight",) * (not run.config.tie_embeddings)
        names += ("ln_f.bias", "ln_f.weight")
    found = {t.name.removeprefix("transformer."): t.whole for t in run.tensors}
    return next(found[of + name] for name in names if of + name in found)


def sizes(run) -> dict:
    """The names that lines of this file are made of, and those of formulas.py that mean a share."""
    layer = [t for t in run.tensors if t.in_layer]
    rest = [t for t in run.tensors if not t.in_layer]
    e, w, fused = run.stream_bytes, run.param_bytes, run.fused
    gathered = {name: sum(t.padded for t in ts) for name, ts in (("l", layer), ("r", rest))}
    whole = {name: sum(t.whole for t in ts) for name, ts in (("l", layer), ("r", rest))}
    adds_up = run.micro_batches > 1 and not reduces_each(run)
    stand = run.micro_batches > 1 and not adds_up  # shares of those of earlier micro-batches
    numbers = whole["l"] * run.config.n_layer + whole["r"]
    in_place = adds_up and w == e  # autograd adds to the gradient that stands
    head = 0 if run.config.tie_embeddings or in_place else run.config.vocab_size
    return dict(
        N=run.shares, ddp=0, fused=int(fused),
        block=gathered["l"] * e, tables=gathered["r"] * e,
        out_layer=gathered["l"] * w, out_rest=gathered["r"] * w,
        own_layer=0 if adds_up else whole["l"] * e,
        own_rest=whole["r"] * (w if adds_up else e),
        stood_layer=whole["l"] * w if adds_up else gathered["l"] * w / run.shares,
        accumulates=int(adds_up or stand),
        gradients=numbers * w if adds_up else sum(t.bytes * t.count for t in run.tensors),
        gradients_layer=gathered["l"] * w / run.shares,
        untied_stands=head * run.config.n_embd * e,
        copies=int(run.device_type == "cpu"),
        loop_layer=whole_of_the_last(run, "h.0.") * (w if adds_up else e),
        loop_rest=whole_of_the_last(run, "") * (w if adds_up else e),
        weights=sum(t.bytes * t.count for t in run.tensors),
        state=sum(t.state_bytes * t.count for t in run.tensors),
        at_step=sum(t.bytes * t.count for t in run.tensors),
        update=0 if fused else update(run, run.tensors),
        update_layer=update(run, [replace(t, count=1) for t in layer]) if fused else 0,
        update_rest=update(run, rest) if fused else 0,
    )  # fmt: skip
