"""How a run that does not say is shared out over its processes: --parallel=auto."""

import torch

from leangpt.memory.formulas import predict_training_peak
from leangpt.memory.meter import tensor_bytes
from leangpt.optim import planned_bytes

RESERVE = 0.1  # of a card's memory, left free


def parallel_mode(settings, model, make_optimizer, runtime) -> str:
    """settings.parallel, or what "auto" means: none for one process, ddp where a step fits a GPU
    (on the CPU always), else fsdp.

    model: a GPT, perhaps on the CPU still. make_optimizer(settings, model, runtime): as train.py's.
    """
    if settings.parallel != "auto":
        return settings.parallel
    if runtime.world_size == 1:
        return "none"
    if "fused_backward" in settings.optimizer_options:  # which ddp cannot
        return "fsdp"
    if runtime.device_type != "cuda":
        return "ddp"
    with torch.device("meta"):
        shapes = type(model)(model.config).to(next(model.parameters()).dtype)
    optimizer = make_optimizer(settings, shapes, runtime)
    state = sum(planned_bytes(optimizer, p, g) for g in optimizer.param_groups for p in g["params"])
    needed = (
        tensor_bytes(model)
        + state
        + predict_training_peak(
            model.config,
            settings.batch_size,
            settings.block_size,
            4 if runtime.dtype == torch.float32 else 2,
            "cuda",
            gradient_size=next(model.parameters()).element_size(),
        )
    )
    memory = torch.cuda.get_device_properties(runtime.device).total_memory
    return "ddp" if needed <= (1 - RESERVE) * memory else "fsdp"
