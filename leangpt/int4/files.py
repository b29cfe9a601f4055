"""Saving and loading 4-bit models as safetensors: packed on the disk, packed from the start.

A file holds the tensors of the quantised model's state dict (layers/int4_linear.py: `packed`,
`scale_zero`) and, in its header, the model's arguments, the group size, a checksum, and the files
of its tokenizer and chat format, each under TEXT and its name. Loading
builds the model without its float linear weights: they never exist, neither on the disk nor in
memory.
"""

import hashlib
import json
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from leangpt.int4.quantize import empty_int4_, gather_, int4_layers
from leangpt.layers.int4_linear import Int4Linear
from leangpt.system.errors import UserError, refused
from leangpt.system.reading import mapping, regular_file
from leangpt.system.whole_files import written_whole
from leangpt.text.model_text import check_data
from leangpt.weights.empty_model import shapes_of
from leangpt.weights.find import refuse_misnamed_gguf

FORMAT = "int4-groups"
TEXT = "text/"
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # what may not be packed


def save_int4(model, path, notes=None):
    """Write a quantised GPT to `path` (.safetensors), atomically.

    notes: a JSON-able dict kept in the header (where it came from, say); its `text_files` (those of
    text_files.py, {name: content}) are a field each. Raises UserError if the model is not quantised
    or the path not writable.
    """
    notes = dict(notes or {})
    text_files = notes.pop("text_files", {})
    sizes = {layer.group_size for layer in int4_layers(model).values()}
    if len(sizes) != 1:
        raise UserError("save_int4: the model is not in 4 bits; call quantize_gpt_ first")
    tensors = {name: t.contiguous().cpu() for name, t in model.state_dict().items()}
    header = {
        "format": FORMAT,
        "sha256": checksum(tensors),
        "group_size": str(sizes.pop()),
        "model_args": json.dumps(asdict(model.config)),
        "notes": json.dumps(notes),
    }
    header |= {TEXT + name: content for name, content in text_files.items()}
    with written_whole(path, fsync=True) as temporary:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:  # its class for a full disk, too
            raise OSError(str(error)) from error


def load_int4(GPT, path, device="cpu", dtype=torch.bfloat16, **overrides):
    """The model that save_int4 wrote -> (GPT in eval mode, notes).

    dtype: of what is not packed (embeddings, norms, biases). overrides: config fields such as
    attention_policy. Raises UserError for a missing, damaged or foreign file, and for tensors
    missing or of the wrong shape or dtype: kernels read them by address, and check nothing.
    """
    refuse_misnamed_gguf(path)
    try:
        with mapping(path), safe_open(regular_file(path), "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise UserError(f"{path} is not a 4-bit model of this project's (save_int4)")
            arguments, group_size, notes = read_header(header, path)
            config = GPT.config_class.from_dict({**arguments, **overrides})
            names = list(file.keys())
            model = empty_int4_(shapes_of(GPT, config, len(names), path), group_size)
            tensors = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    except SafetensorError as error:
        raise UserError(f"cannot read {path}: {error}; save it again with save_int4") from None
    check_tensors(tensors, wanted_tensors(model), path)
    if header.get("sha256", "none") not in ("none", checksum(tensors)):  # older files have none
        raise UserError(f"{path} is damaged: its checksum differs; save it again with save_int4")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith(".scale_zero"):
            tensors[name] = tensor.to(dtype)
    model.load_state_dict(tensors, assign=True)
    model.to(device)
    del tensors
    gather_(model)
    return model.eval(), notes


def read_header(header, path):
    """(model arguments, group size, notes) of a file's header. UserError where they are damaged."""
    try:
        arguments, notes = json.loads(header["model_args"]), json.loads(header["notes"])
        group_size = int(header["group_size"])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"the header of {path} is damaged ({error})") from None
    if not isinstance(arguments, dict) or not isinstance(notes, dict):
        raise UserError(f"the header of {path} is damaged: model_args and notes are no objects")
    check_data(notes.get("dataset"), path)
    if not isinstance(notes.get("init_from") or "", str):
        raise UserError(f"{path} is damaged: init_from is no text: {notes['init_from']!r:.50}")
    files = {name: content for name, content in header.items() if name.startswith(TEXT)}
    if files:
        notes["text_files"] = {name.removeprefix(TEXT): text for name, text in files.items()}
    return arguments, group_size, notes


def checksum(tensors):
    """sha256 (hexadecimal) of the names and the bytes of some tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\n")
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def wanted_tensors(model):
    """(shape, dtype) of every entry of a quantised model's state dict; any floating dtype: None."""
    wanted = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Int4Linear):
            own = module.saved_tensors()
        else:
            parameters = module.named_parameters(recurse=False)
            own = {name: (tuple(p.shape), None) for name, p in parameters}
        wanted |= {f"{prefix}.{name}": entry for name, entry in own.items()}
    return wanted


def check_tensors(tensors, wanted, path):
    """Raise UserError naming a tensor that is missing, left over, or of another shape or dtype."""
    for name in sorted(wanted.keys() | tensors.keys()):
        shape, dtype = wanted.get(name, ("none", None))
        found = tuple(tensors[name].shape) if name in tensors else "none"
        if shape != found:
            raise UserError(f"{path}: {name} should have shape {shape}, the file has {found}")
        kind = tensors[name].dtype
        if kind != dtype and (dtype or kind not in FLOATS):
            allowed = dtype or "one of " + ", ".join(map(str, FLOATS))
            raise UserError(f"{path}: {name} is {kind}, not {allowed}")
