"""Checkpoints of sharded runs: each process writes its own rows, into one folder (DCP).

A checkpoint stays one small file that is written whole or not at all (runs/checkpoint.py); of a
sharded run it names the folder that its tensors lie in, beside it, and says the size and the sha256
of every file there. The folder is complete before the file names it, and is never written to again:
whoever is killed on the way leaves the last one. No two checkpoints share one.

Read, it is the same checkpoint as any other: whole tensors, whatever the number of processes then
and now. The format is torch.distributed.checkpoint's; its table of contents is a pickle, of which
here only that table's own classes are read.
"""

import hashlib
import math
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
    once. Raises RunError, in all of them, where one could not write, and UserError where one does
    not see what another one wrote.
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
    files = facts_of_all(path)
    sizes, digests = ({n: facts[i] for n, facts in files.items()} for i in (0, 1))
    return left | {"shards": {"folder": path.name, "files": sizes, "sha256": digests}}


def facts_of_all(path):
    """{file in `path`: (bytes, sha256)}, each read by the process that wrote it.

    Raises UserError, in all processes, where one of them does not see a file of another's as it is:
    on disks of their own they would write checkpoints that nobody can read.
    """
    rank, several = dist.get_rank(), [None] * dist.get_world_size()
    mine = [*path.glob(f"__{rank}_*"), *([path / CONTENTS] if rank == 0 else [])]
    own = {file.name: (file.stat().st_size, digest_of(file)) for file in mine}
    dist.all_gather_object(several, own)
    files = {name: facts for own in several for name, facts in sorted(own.items())}
    unseen = [name for name, (size, _) in files.items() if size_of(path / name) != size]
    dist.all_gather_object(several, unseen)
    for other, unseen in enumerate(several):
        if unseen:
            raise UserError(
                f"process {other} does not see {path / unseen[0]} as another one wrote it: out_dir "
                "must be one folder that all processes see"
            )
    return files


def size_of(path):
    """Bytes of a file, or "missing"."""
    return path.stat().st_size if path.is_file() else "missing"


def digest_of(path):
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    shards, tied = checkpoint.pop("shards"), checkpoint.pop("tied", None) or {}
    try:
        path = folder / Path(shards["folder"]).name
        check_files(path, shards["files"], shards.get("sha256") or {})  # older ones have none
        tensors = read_tensors(path, sum(shards["files"].values()))
        put_back(checkpoint["model"], checkpoint["optimizer"]["state"], tensors)
        for name, other in tied.items():
            checkpoint["model"][name] = checkpoint["model"][other]
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged or a stranger's file may fail in any way there is
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[-1][:200]
        raise UserError(f"the checkpoint's shards in {folder} are damaged ({reason})") from None
    return checkpoint


def check_files(path, sizes, digests):
    """Raise UserError where a file of the folder is not what was written."""
    for name, size in sizes.items():
        file = path / Path(name).name
        if (have := size_of(file)) != size:
            raise UserError(f"{file} should have {size} bytes, and is {have}")
        if name in digests and digest_of(file) != digests[name]:
            raise UserError(f"{file} is damaged: its checksum differs")


def read_tensors(path, most):
    """{name: whole tensor} of a folder that DCP wrote, which has `most` bytes in all."""
    import torch.distributed.checkpoint as dcp

    reader = reader_of(path)
    announced = reader.read_metadata().state_dict_metadata
    needed = sum(math.prod(t.size) * t.properties.dtype.itemsize for t in announced.values())
    if needed > most:
        raise UserError(f"{path} announces tensors of {needed:,} bytes, and has {most:,}")
    tensors = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in announced.items()
    }
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except dcp.api.CheckpointException as error:  # no Exception
        raise UserError(
            f"{path} is damaged ({str(error).strip().splitlines()[-1][:200]})"
        ) from None
    return tensors


def put_back(model, states, tensors):
    """Tensors of a folder, into the weights and the optimizer's state that they were taken from."""
    for key, tensor in tensors.items():
        kind, rest = key.split(".", 1)
        if kind == "model":
            model[rest] = tensor
        else:
            index, name = rest.split(".", 1)
            if name in QUANTIZED and tensor.ndim == 3:  # (rows, blocks of a row, width)
                tensor = tensor.flatten(0, 1)
            states[int(index)][name] = tensor


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
