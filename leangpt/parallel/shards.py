"""Checkpoints of sharded runs: each process writes its own rows, into one folder (DCP).

A checkpoint stays one small file that is written whole or not at all (runs/checkpoint.py); of a
sharded run it names the folder that its tensors lie in, beside it. The folder is complete before
the file names it, and is never written to again: whoever is killed on the way leaves the last one.

Read, it is the same checkpoint as any other: whole tensors, whatever the number of processes then
and now. The format is torch.distributed.checkpoint's; its table of contents is a pickle, of which
here only that table's own classes are read.
"""

import pickle
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from leangpt.optim.sharded.rows import QUANTIZED, is_sharded
from leangpt.system.errors import RunError, UserError
from leangpt.system.whole_files import sync

PREFIX = "shards-"  # of the folders' names
CONTENTS = ".metadata"  # DCP's table of contents


def has_shards(model: torch.nn.Module) -> bool:
    """Are the weights of this module sharded?"""
    return any(is_sharded(p) for p in model.parameters())


# ---------------------------------------------------------------------- writing


def write_shards(checkpoint: dict, model: torch.nn.Module, folder: Path, name: str) -> dict:
    """Write the DTensors of `checkpoint` to folder/PREFIX-name, every process its own rows.

    checkpoint: with entries "model" and "optimizer", a state_dict each. Returns it without those
    tensors, and with where they are: what belongs in the small file. Called by all processes at
    once. Raises RunError, in all of them, where one could not write.
    """
    import torch.distributed.checkpoint as dcp

    left, tensors = taken_apart(checkpoint, tied_names(model))
    path = free_name(folder, name)
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.save(tensors, checkpoint_id=path)
    except dcp.api.CheckpointException as error:
        reasons = [failure[0] for failure in error.failures.values()]
        raise RunError(f"cannot write {path}: {reasons[0]}") from None
    if dist.get_rank() == 0:
        sync(path)
    dist.barrier()
    sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
    return left | {"shards": {"folder": path.name, "files": sizes}}


def tied_names(model):
    """{a parameter's further name: its first}."""
    first, tied = {}, {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), name) != name:
            tied[name] = first[id(p)]
    return tied


def taken_apart(checkpoint, tied):
    """(the checkpoint without its DTensors, {"model.NAME" or "optimizer.INDEX.NAME": DTensor})."""
    tensors, states = {}, {}
    for name, value in checkpoint["model"].items():
        if name not in tied:
            tensors[f"model.{name}"] = value
    for index, state in checkpoint["optimizer"]["state"].items():
        states[index] = {n: v for n, v in state.items() if not is_sharded(v)}
        tensors |= {f"optimizer.{index}.{n}": v for n, v in state.items() if is_sharded(v)}
    optimizer = checkpoint["optimizer"] | {"state": states}
    return checkpoint | {"model": {}, "optimizer": optimizer, "tied": tied}, tensors


def free_name(folder, name):
    """A folder for `name` that does not exist yet, chosen by the first process for all."""
    chosen = [None]
    if dist.get_rank() == 0:
        path, number = folder / f"{PREFIX}{name}", 1
        while path.exists():  # an earlier one's, perhaps named by a checkpoint
            number += 1
            path = folder / f"{PREFIX}{name}-{number}"
        chosen = [str(path)]
    dist.broadcast_object_list(chosen)
    return Path(chosen[0])


def remove_others(folder: Path, named: set[str]) -> None:
    """Remove the folders of shards in `folder` but for those `named`."""
    for path in folder.glob(f"{PREFIX}*"):
        if path.name not in named and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------- reading


def with_shards(checkpoint: dict, folder: Path) -> dict:
    """A checkpoint read from the small file, with its tensors from the folder it names: whole.

    Raises UserError where that folder is not as it was written.
    """
    import torch.distributed.checkpoint as dcp

    shards = checkpoint.pop("shards")
    path = folder / Path(shards["folder"]).name
    for name, size in shards["files"].items():
        file = path / Path(name).name
        have = file.stat().st_size if file.is_file() else "missing"
        if have != size:
            raise UserError(f"{file} should have {size} bytes, and is {have}")
    reader = reader_of(path)
    tensors = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in reader.read_metadata().state_dict_metadata.items()
    }
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({str(error).strip().splitlines()[-1][:200]})"
        ) from None
    model, states = checkpoint["model"], checkpoint["optimizer"]["state"]
    for key, tensor in tensors.items():
        kind, rest = key.split(".", 1)
        if kind == "model":
            model[rest] = tensor
        else:
            index, name = rest.split(".", 1)
            if name in QUANTIZED and tensor.ndim == 3:  # (rows, blocks of a row, width)
                tensor = tensor.flatten(0, 1)
            states[int(index)][name] = tensor
    for name, other in checkpoint.pop("tied").items():
        model[name] = model[other]
    return checkpoint


def reader_of(path):
    """DCP's reader of a folder, which believes no pickle more than it must."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(Path(path) / CONTENTS, "rb") as file:
                metadata = _Contents(file).load()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


class _Contents(pickle.Unpickler):
    """Reads DCP's table of contents, and of all classes those that such a table is made of."""

    def find_class(self, module, name):
        ours = module in (
            "torch.distributed.checkpoint.metadata",
            "torch.distributed.checkpoint.filesystem",
        )
        named = {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("pathlib", "PurePosixPath"),
            ("collections", "OrderedDict"),
        }
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in named or ours and name in CONTENTS_CLASSES:
            return super().find_class(module, name)
        raise UserError(f"a checkpoint's {CONTENTS} holds {module}.{name}, which is no part of one")


CONTENTS_CLASSES = (
    "Metadata",
    "StorageMeta",
    "MetadataIndex",
    "TensorStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
    "BytesStorageMetadata",
    "_MEM_FORMAT_ENCODING",
    "_StorageInfo",
)
