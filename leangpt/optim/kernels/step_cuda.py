"""Which tensors the CUDA kernels of step_triton.py take, and how they are launched.

A `Stack` is a run of equally shaped tensors of one group: one launch per kernel. What does not
change between steps (which stacks there are, every address but the gradients') is kept, as
dispatch.py says for how long; the address table goes to the device again only when a gradient has
moved.
"""

import math

import torch

from leangpt.optim.arithmetic import HUGEST
from leangpt.optim.kernels import step_triton as kernels
from leangpt.optim.kernels.step_triton import WIDTH
from leangpt.system.triton import AVAILABLE, INTERPRETED, tl, triton

TYPES = {} if triton is None else {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

LEAST = 1 << 18  # numbers of a stack that are worth a launch
MOST = 1 << 25  # numbers that MuonSN orthogonalises at once: 64 MB of bfloat16
WIDEST = 8192  # columns of a matrix: a row stays in one program's registers
PROGRAMS = 2112  # sixteen for each of an H100's 132 processors
BITS = {torch.float32: 32, torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}
SECONDS = ("second_moment", "row_mean_square", "column_mean_square")


def supports(item):
    """Can the kernels take this item, simple as dispatch.py asks? PyTorch takes the others."""
    p, grad = item.param, item.grad
    if not AVAILABLE or not (p.is_cuda or INTERPRETED):
        return False
    columns = math.prod(p.shape[1:])
    return (
        32 <= columns <= WIDEST
        and columns % 32 == 0
        and p.numel() < 1 << 30
        and p.dtype in TYPES
        and grad.dtype in TYPES
        and all(t.data_ptr() % 16 == 0 for t in (p, grad, *item.state.values()))
    )


def stacks_of(items, most=None):
    """Supported items -> Stacks, but for those too few to be worth a launch."""
    alike, stacks = {}, []
    for item in items:
        p = item.param
        key = (id(item.group), p.device, p.shape, p.dtype, item.grad.dtype, item.step)
        alike.setdefault((*key, bits_of(item)), []).append(item)
    for same in alike.values():
        numbers = same[0].param.numel()
        if numbers * len(same) > LEAST:
            count = len(same) if most is None else max(1, most // numbers)
            stacks += [Stack(same[i : i + count]) for i in range(0, len(same), count)]
    return stacks


def bits_of(item):
    """Bits of an item's stored momentum; 0: it has none."""
    momentum = item.state.get("momentum")
    return 0 if momentum is None else BITS[momentum.dtype]


class Stack:
    """N equally shaped matrices of one group, and the device table of their addresses."""

    def __init__(self, items):
        self.items, self.group = items, items[0].group
        first = items[0].param
        self.device, self.rows = first.device, first.shape[0]
        self.columns = first.numel() // self.rows
        rounded = first.dtype == torch.bfloat16 and self.group["stochastic_rounding"]
        self.grad_type = TYPES[items[0].grad.dtype]
        # columns and blocks of 32 of a tile that holds a whole row
        self.blocks = triton.next_power_of_2(self.columns) // 32
        self.warps = min(16, max(1, self.blocks // 8))
        self.weight = dict(P=TYPES[first.dtype], ROUND=rounded)
        self.bits = bits_of(items[0])
        self.lines = [self.line(item) for item in items]
        self.grads = self.table = None
        self.compiled = {}  # id of a kernel -> what it was compiled to, and its constants

    @property
    def step(self):
        return self.items[0].step

    @staticmethod
    def line(item):
        """[parameter, gradient, momentum, scales, second moments, number]: see the kernels."""
        state = item.state
        tensors = [state.get("momentum"), state.get("momentum_scale")]
        seconds = [state[name] for name in SECONDS if name in state]
        tensors += seconds + [None] * (2 - len(seconds))
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        line = [item.param.data_ptr(), 0, *addresses, item.number]
        return line + [0] * (WIDTH - len(line))

    def addresses(self):
        """The device table (N, WIDTH) int64 with this step's gradients; nothing waits for it."""
        grads = [item.grad.data_ptr() for item in self.items]
        if grads != self.grads:
            for line, grad in zip(self.lines, grads):
                line[1] = grad
            on_gpu = self.device.type == "cuda"
            table = torch.tensor(self.lines, dtype=torch.int64, pin_memory=on_gpu)
            self.table = table.to(self.device, non_blocking=True)
            self.grads = grads
        return self.table

    def launch(self, kernel, grid, *args, num_warps, **constants):
        """kernel[grid](*args, ...); from the second time on without Triton's search for the
        compiled kernel, which takes the host longer than most kernels take the GPU. A stack's
        arguments keep their types and alignment, all that the search goes by."""
        if id(kernel) in self.compiled:
            compiled, constants = self.compiled[id(kernel)]
            compiled[(*grid, 1, 1)[:3]](*args, *constants)
            return
        compiled = kernel[grid](*args, num_warps=num_warps, **constants)
        if not INTERPRETED:
            constants = [constants[name] for name in kernel.arg_names[len(args) :]]
            self.compiled[id(kernel)] = compiled, constants

    def floats(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def decay_and_rate(self):
        rate = float(self.group["lr"])
        return 1 - rate * float(self.group["weight_decay"]), rate

    def adamsn(self, *rest):
        with self:
            adamsn(self, *rest)

    def adafactor(self, *rest):
        with self:
            adafactor(self, *rest)

    def muonsn(self, *rest):
        with self:
            muonsn(self, *rest)

    def __enter__(self):  # kernels go to the current device
        self.guard = torch.cuda.device(self.device) if self.device.type == "cuda" else None
        if self.guard:
            self.guard.__enter__()

    def __exit__(self, *error):
        if self.guard:
            self.guard.__exit__(*error)


def adamsn(stack, share, weight, correction2):
    """One step of AdamSN with a second moment per row, or block of 32; the numbers of
    AdamSN.schedule."""
    (beta1, beta2), group = stack.group["betas"], stack.group
    decay, rate = stack.decay_and_rate()
    first = stack.items[0]
    run = first.param.numel() // first.state["second_moment"].numel()
    factor = 1.0 if group["norm"] == "sum" else 1 / run
    stack.launch(
        kernels.adamsn_rows,
        (len(stack.items) * stack.rows,),
        stack.addresses(),
        stack.step,
        1.0 - beta1,
        1.0 - beta2,
        float(share),
        float(correction2),
        float(group["eps"]),
        factor,
        decay,
        rate * weight,
        stack.rows,
        COLS=stack.columns,
        NB=stack.blocks,
        BLOCKS=run < stack.columns,
        G=stack.grad_type,
        BITS=stack.bits,
        num_warps=stack.warps,
        **stack.weight,
    )


def adafactor(stack, fresh):
    """One step of Adafactor: sums, moments, the root mean square of U, weights."""
    group, n, rows, columns = stack.group, len(stack.items), stack.rows, stack.columns
    block = min(1024, triton.next_power_of_2(columns))
    sub = 4096 // block  # rows that a program looks at together
    wide = triton.cdiv(columns, block)
    tile = triton.next_power_of_2(triton.cdiv(n * rows * wide, PROGRAMS))
    tile = min(max(tile, 2 * sub), 32 * sub)
    high = triton.cdiv(rows, tile)
    by_row, by_column = stack.floats(n, wide, rows), stack.floats(n, high, columns)
    means, squares = stack.floats(n), stack.floats(n, high * wide)
    table, warps = stack.addresses(), 8
    shape = dict(COLS=columns, TILE=tile, SUB=sub, BLOCK=block, G=stack.grad_type, num_warps=warps)
    stack.launch(kernels.factor_sums, (n * high * wide,), table, by_row, by_column, rows, **shape)
    stack.launch(
        kernels.factor_moments,
        (n, 1 + triton.cdiv(columns, 64)),
        table,
        by_row,
        by_column,
        means,
        float(fresh),
        float(group["eps"][0]),
        rows,
        high,
        COLS=columns,
        WIDE=wide,
        HUGEST=HUGEST,
        num_warps=4,
    )
    clips = group["clip"] is not None
    if clips:
        stack.launch(kernels.factor_rms, (n * high * wide,), table, means, squares, rows, **shape)
    decay, rate = stack.decay_and_rate()
    stack.launch(
        kernels.factor_write,
        (n * high * wide,),
        table,
        means,
        squares,
        stack.step,
        float(group["clip"] or 1),
        1.0 - group["momentum"],
        decay,
        rate,
        rows,
        BITS=stack.bits,
        TILES=high * wide if clips else 0,
        **shape,
        **stack.weight,
    )


def muonsn(stack, correction, orthogonalize):
    """One step of MuonSN. correction: 1 - row_beta2^step; orthogonalize: (N, n, m), group -> same.

    What is orthogonalised is bfloat16 on CUDA, as its products are.
    """
    group, n, rows, columns = stack.group, len(stack.items), stack.rows, stack.columns
    dtype = torch.bfloat16 if stack.device.type == "cuda" else torch.float32
    ahead = torch.empty(n, rows, columns, dtype=dtype, device=stack.device)
    shape = dict(COLS=columns, NB=stack.blocks, num_warps=stack.warps)
    table, grid, mu = stack.addresses(), (n * rows,), group["momentum"]
    stack.launch(
        kernels.muon_ahead,
        grid,
        table,
        ahead,
        stack.step,
        float(mu),
        float(group["nu"]),
        rows,
        G=stack.grad_type,
        BITS=stack.bits,
        **shape,
    )
    update = orthogonalize(ahead, group).contiguous()
    del ahead
    scales, parts, factors = stack.floats(n, rows), stack.floats(n, rows), stack.floats(n)
    stack.launch(
        kernels.muon_rows,
        grid,
        table,
        update,
        scales,
        parts,
        1.0 - group["row_beta2"],
        float(correction),
        float(group["eps"]),
        rows,
        **shape,
    )
    rms = float(group["update_rms"])
    stack.launch(kernels.muon_rms, (n,), parts, factors, rms, rows, num_warps=4)
    decay, rate = stack.decay_and_rate()
    stack.launch(
        kernels.muon_write,
        grid,
        table,
        update,
        scales,
        factors,
        stack.step,
        decay,
        rate,
        rows,
        **shape,
        **stack.weight,
    )
