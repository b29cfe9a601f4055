"""Checkpoints: written whole or not at all, read without running code, nanoGPT's format.

A checkpoint is a dict with nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss,
config) and a few of ours. `ckpt.pt` holds the best model so far, `ckpt_last.pt` the latest state:
training resumes from the latter. Both hold everything, so either can be sampled or resumed. Of a
sharded run they name a folder beside them that has the tensors (parallel/shards.py);

    python -m leangpt.runs.checkpoint out

makes single files of those in `out`, for other readers than ours.
"""

import math
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from leangpt.parallel.shards import has_shards, remove_others, with_shards, write_shards
from leangpt.runs.bounds import check_bounds, check_zip, is_zip
from leangpt.system.errors import UserError, exit_cleanly, refused
from leangpt.system.lock import FolderLock
from leangpt.system.plain_numbers import foreign_object, numbers_allowed
from leangpt.system.reading import parsing, regular_file
from leangpt.system.whole_files import written_whole
from leangpt.text.model_text import check_data
from leangpt.weights.empty_model import allocate, shapes_of

BEST, LAST = "ckpt.pt", "ckpt_last.pt"
REQUIRED = ("model", "model_args", "iter_num")


def save_checkpoint(path, checkpoint):
    """Write `checkpoint` (dict) to `path` so that a crash at any moment leaves the old file whole.

    On the disk, name and all, when this returns. Raises UserError where the disk is full or not
    writable; the old file is then untouched.
    """
    with written_whole(path, fsync=True) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # its class for a full disk, too
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(str(error)) from error


def save_run(paths, model, optimizer, scaler, dataset, config, main=True, **progress):
    """Write a run's state to each of `paths`, in that order: see `save_checkpoint`.

    Of a sharded model's processes all call this together, and each writes its rows; `main` is the
    one that writes the rest. config: its settings as a dict. progress: iter_num, best_val_loss,
    train_seconds, and text_files: of the model's own text (text_files.py), {} where the data set's
    meta says all.
    """
    first, *others = map(Path, paths)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "model_args": model_args(model),
        "config": config,
        "dataset": {"name": dataset.name, **dataset.meta},
        **progress,
    }
    if has_shards(model):
        name = f"{progress['iter_num']:08d}"
        for path in (first, *others):  # each with tensors of its own, as copies have theirs
            saved = write_shards(checkpoint, model, first.parent, name)
            if main:
                save_checkpoint(path, saved)
    elif main:
        save_checkpoint(first, checkpoint)
        for other in others:
            copy_checkpoint(first, other)
    if main:
        remove_unnamed_shards(first.parent)


def remove_unnamed_shards(folder: Path) -> None:
    """Remove the folders of shards that neither checkpoint names: older ones, and what a killed
    process had not finished."""
    try:
        named = {shards_named_in(folder / name) for name in (BEST, LAST)}
    except (UserError, OSError):  # of a damaged one the tensors may be whole
        return
    remove_others(folder, named)


def shards_named_in(path):
    """The folder of shards that a checkpoint's tensors are in; None: they are in the file, or there
    is none. Raises UserError or OSError where it cannot be told."""
    if not path.exists() or not is_zip(path):
        return None
    with parsing(path), numbers_allowed():
        return torch.load(path, mmap=True, weights_only=True).get("shards", {}).get("folder")


def consolidate(out_dir: Path) -> list[Path]:
    """Make single files of the checkpoints in `out_dir` that name a folder of shards, one after the
    other; the folders are gone then. Returns their paths. Raises UserError where a run is going on
    there, or where nothing is to be read."""
    if not checkpoint_to_resume(out_dir).is_file():
        raise UserError(f"no checkpoint in {out_dir}")
    lock = FolderLock(out_dir)
    try:
        done = [path for path in (out_dir / BEST, out_dir / LAST) if shards_named_in(path)]
        for path in done:
            save_checkpoint(path, load_checkpoint(path))
        remove_others(out_dir, set())
    finally:
        lock.release()
    return done


def copy_checkpoint(source, path):
    """Make `path` the same checkpoint as `source`, as atomically: a second copy of the bytes, so
    that what happens to one on the disk does not happen to the other."""
    with written_whole(path, fsync=True) as temporary:
        shutil.copyfile(source, temporary)


def load_checkpoint(path, device="cpu", mmap=False):
    """Read a checkpoint of ours or nanoGPT's -> dict, its tensors on `device`.

    mmap: leave tensors in the file until they are looked at, for a caller that wants shapes.
    Only tensors and plain values are unpickled (weights_only=True), and every byte is held against
    the file's checksums first (with mmap, all but the tensors'). Names that torch.compile or DDP
    prefixed are cleaned, and nanoGPT's causal-mask buffers are dropped. Raises UserError for a
    missing, damaged or foreign file; it names the folder's other checkpoint where that one is
    whole.
    """
    try:
        return _read(Path(path), device, mmap)
    except UserError as error:
        raise type(error)(f"{error}{_other_one(Path(path))}") from None


def _read(path, device, mmap):
    try:
        check_zip(regular_file(path), tensors=not mmap)
        with warnings.catch_warnings(action="ignore"), numbers_allowed():  # of what fails below
            checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        check_bounds(checkpoint, path.stat().st_size)
    except FileNotFoundError:
        raise UserError(
            f"no checkpoint at {path}; train first, or set out_dir to a folder that has one"
        ) from None
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file may fail in any way there is
        if foreign := foreign_object(error):
            raise UserError(
                f"{path} holds an object of {foreign}, which could run code: only tensors and "
                "plain values are read; save it again without"
            ) from None
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path} is truncated or not a checkpoint ({reason})") from None
    missing = [key for key in REQUIRED if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of this project or of nanoGPT: it lacks "
            f"{', '.join(missing)}"
        )
    _check_entries(checkpoint, path)
    if "shards" in checkpoint:
        checkpoint = with_shards(checkpoint, path.parent)
    checkpoint["model"] = {
        _plain_name(name): tensor
        for name, tensor in checkpoint["model"].items()
        if not name.endswith(".attn.bias")
    }
    checkpoint["best_val_loss"] = float(checkpoint.get("best_val_loss", math.inf))
    return checkpoint


def _check_entries(checkpoint, path):
    """Raise UserError naming an entry that is not of its type."""
    number = (
        "a number",
        lambda value: (
            isinstance(value, int | float) or (torch.is_tensor(value) and value.numel() == 1)
        ),
    )
    seconds = "a time", lambda value: number[1](value) and 0 <= float(value) < 1e12
    mapping = "a dict", lambda value: isinstance(value, dict) and all(type(k) is str for k in value)
    texts = "a dict of texts", lambda v: mapping[1](v) and all(type(t) is str for t in v.values())
    rules = {
        "model": (
            "a dict of dense tensors",
            lambda value: (
                mapping[1](value)
                and all(torch.is_tensor(t) and t.layout == torch.strided for t in value.values())
            ),
        ),
        "model_args": mapping,
        "iter_num": ("a count", lambda value: type(value) is int and 0 <= value < 2**53),
    }
    optional = {
        "best_val_loss": number,
        "train_seconds": seconds,
        "config": mapping,
        "dataset": mapping,
        "text_files": texts,
        "scaler": mapping,
        "optimizer": mapping,
        "shards": mapping,
        "tied": mapping,
    }
    for name, (kind, fits) in {**rules, **optional}.items():
        value = checkpoint.get(name)
        if not fits(value) and (name in rules or value is not None):
            raise UserError(
                f"{path} is damaged: {name} is {kind} in a checkpoint, not {value!r:.50}"
            )
    check_data(checkpoint.get("dataset"), path)
    name = (checkpoint.get("config") or {}).get("dataset")
    if name is not None and not isinstance(name, str):
        raise UserError(f"{path} is damaged: config's dataset is no text: {name!r:.50}")


def _other_one(path):
    """What to say of the folder's other checkpoint, where there is a whole one; else nothing."""
    other = path.with_name(BEST if path.name == LAST else LAST)
    if path.name not in (BEST, LAST) or not path.exists():
        return ""
    try:
        iteration = _read(other, "cpu", False)["iter_num"]
    except (UserError, MemoryError):
        return ""
    return f"; {other} is whole (iteration {iteration}) and is read where {path.name} is moved away"


def _plain_name(name):
    return name.removeprefix("module.").removeprefix("_orig_mod.").removeprefix("module.")


def checkpoint_to_resume(out_dir):
    """Path of the latest state in `out_dir`: ckpt_last.pt, else ckpt.pt (nanoGPT's only one)."""
    last = Path(out_dir) / LAST
    return last if last.exists() else Path(out_dir) / BEST


def model_from_checkpoint(GPT, checkpoint, **overrides):
    """A GPT with the checkpoint's weights, on the CPU in float32.

    GPT: the class (model.py's). overrides: fields of its config that do not touch the weights (its
    FREE). Raises UserError for others, and where weights and model_args disagree.
    """
    fixed = sorted(set(overrides) - set(GPT.config_class.FREE))
    if fixed:
        raise UserError(f"a checkpoint's {', '.join(fixed)} cannot be changed")
    config = GPT.config_class.from_dict({**checkpoint["model_args"], **overrides})
    weights = checkpoint["model"]
    model = shapes_of(GPT, config, len(weights), "the checkpoint's model_args")
    _check_shapes(weights, model.state_dict())  # before memory of any size is asked for
    model = allocate(model)
    model.load_state_dict(weights)
    return model


def _check_shapes(weights, wanted):
    """Raise UserError naming a weight that is missing, left over or misshapen."""
    for name in sorted(wanted.keys() | weights.keys()):
        need = list(wanted[name].shape) if name in wanted else "none"
        have = list(weights[name].shape) if name in weights else "none"
        if need != have:
            raise UserError(
                f"the checkpoint's weights do not fit its model_args: {name} should have shape "
                f"{need}, and has {have}"
            )


def model_args(model):
    """The `model_args` entry of a checkpoint: every field of the model's GPTConfig."""
    return asdict(model.config)


def main():
    """consolidate, of the folder that the command line names."""
    if len(sys.argv) != 2:
        raise UserError("say which folder: python -m leangpt.runs.checkpoint out")
    done = consolidate(Path(sys.argv[1]))
    print("\n".join(f"{path} is a single file" for path in done) or "nothing to do: single files")


if __name__ == "__main__":
    exit_cleanly(main)
