"""Saving and loading 4-bit models as safetensors: packed on the disk, packed from the start.

A file holds the tensors of the quantised model's state dict (layers/int4_linear.py: `packed`,
`scale_zero`) and, in its header, the model's arguments and the group size. Loading builds the model
without its float linear weights: they never exist, neither on the disk nor in memory.
"""

import json
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from leangpt.layers.int4_linear import Int4Linear, gather_, replace_linears
from leangpt.system.errors import UserError
from leangpt.system.whole_files import written_whole
from model import GPT

FORMAT = "int4-groups"


def save_int4(model, path, notes=None):
    """Write a quantised GPT to `path` (.safetensors), atomically.

    notes: a JSON-able dict kept in the header (where the tokenizer is, say). Raises UserError if
    the model is not quantised or the path not writable.
    """
    sizes = {m.group_size for m in model.modules() if isinstance(m, Int4Linear)}
    if len(sizes) != 1:
        raise UserError("save_int4: the model is not in 4 bits; call int4.quantize_ first")
    header = {
        "format": FORMAT,
        "group_size": str(sizes.pop()),
        "model_args": json.dumps(asdict(model.config)),
        "notes": json.dumps(notes or {}),
    }
    tensors = {name: t.contiguous().cpu() for name, t in model.state_dict().items()}
    with written_whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:  # its class for a full disk, too
            raise OSError(str(error)) from error


def load_int4(path, device="cpu", dtype=torch.bfloat16, **overrides):
    """The model that save_int4 wrote -> (GPT in eval mode, notes).

    dtype: of what is not packed (embeddings, norms, biases). overrides: GPTConfig fields such as
    attention_policy. Raises UserError for a missing, damaged or foreign file, and for tensors
    missing or of the wrong shape.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {path}: {error}; save it again with int4_files.save_int4"
        ) from None
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is not a 4-bit model of this project's (int4_files.save_int4)")
    try:
        arguments, notes = json.loads(header["model_args"]), json.loads(header["notes"])
        group_size = int(header["group_size"])
    except (KeyError, ValueError) as error:
        raise UserError(f"the header of {path} is damaged ({error})") from None
    config = GPT.config_class.from_dict({**arguments, **overrides})
    with torch.device("meta"):  # shapes alone
        model = GPT(config)
    replace_linears(model, group_size)
    wanted = saved_shapes(model)
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{path}: {name} should have shape {wanted.get(name, 'none')}, the "
                f"file has {found.get(name, 'none')}"
            )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith("scale_zero"):
            tensors[name] = tensor.to(dtype)
    model.load_state_dict(tensors, assign=True)
    model.to(device)
    del tensors
    gather_(model)
    return model.eval(), notes


def saved_shapes(model):
    """Shapes of every entry of a quantised model's state dict, without making one."""
    shapes = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Int4Linear):
            own = module.saved_shapes()
        else:
            own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        shapes |= {f"{prefix}.{name}": shape for name, shape in own.items()}
    return shapes
