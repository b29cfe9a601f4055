"""A model of the announced shapes before any of its memory exists: files may announce anything."""

import torch
from torch.overrides import TorchFunctionMode

from leangpt.system.errors import UserError


def shapes_of(GPT, config, tensors, where):
    """A GPT of this config on the meta device: shapes alone.

    tensors: how many the file `where` has, which a model's layers cannot outnumber: ten million
    layers would take hours to build even without memory. Raises UserError where they do, and for
    sizes that no tensor can have.
    """
    if config.n_layer > tensors:
        raise UserError(
            f"{where}: {config.n_layer} layers are announced, and the file has {tensors} tensors "
            "in all"
        )
    try:
        with torch.device("meta"), NothingDrawn():
            return GPT(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{where}: no tensor can be of the announced sizes ({reason})") from None


class NothingDrawn(TorchFunctionMode):
    """Initial weights are not drawn: where there is no memory torch imports its compiler to do so,
    which takes seconds."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return arguments[0] if arguments else named["tensor"]
        return function(*arguments, **(named or {}))


def allocate(model, device="cpu", dtype=torch.float32):
    """A GPT on the meta device -> the same with parameters allocated and not yet filled."""
    if model.config.tie_embeddings:  # to_empty would give the two names a tensor each
        model.lm_head.weight = None
    model = model.to(dtype).to_empty(device=device)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model
