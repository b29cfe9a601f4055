"""Checkpoints: written whole or not at all, read without running code, nanoGPT's format.

A checkpoint is a dict with nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss,
config) and a few of ours. `ckpt.pt` holds the best model so far, `ckpt_last.pt` the latest state:
training resumes from the latter. Both hold everything, so either can be sampled or resumed.
"""

import os
import pickle
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from leangpt.system.errors import UserError
from leangpt.system.reading import regular_file
from leangpt.system.whole_files import written_whole
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


def save_run(paths, model, optimizer, scaler, dataset, config, **progress):
    """Write a run's state to each of `paths`, in that order: see `save_checkpoint`.

    config: its settings as a dict. progress: iter_num, best_val_loss, train_seconds.
    """
    first, *others = paths
    save_checkpoint(
        first,
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "model_args": model_args(model),
            "config": config,
            "dataset": {"name": dataset.name, **dataset.meta},
            **progress,
        },
    )
    for other in others:
        copy_checkpoint(first, other)


def copy_checkpoint(source, path):
    """Make `path` the same checkpoint as `source`, as atomically; costs no second copy of the
    bytes where the file system has hard links."""
    with written_whole(path, fsync=True) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def load_checkpoint(path, device="cpu", mmap=False):
    """Read a checkpoint of ours or nanoGPT's -> dict, its tensors on `device`.

    mmap: leave tensors in the file until they are looked at, for a caller that wants shapes.
    Only tensors and plain values are unpickled (weights_only=True). Names that torch.compile or
    DDP prefixed are cleaned, and nanoGPT's causal-mask buffers are dropped. Raises UserError for a
    missing, truncated or foreign file.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, about files that fail below
            checkpoint = torch.load(
                regular_file(path), map_location=device, weights_only=True, mmap=mmap
            )
    except FileNotFoundError:
        raise UserError(
            f"no checkpoint at {path}; train first, or set out_dir to a folder that has one"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path} is truncated or not a checkpoint ({reason})") from None
    missing = [key for key in REQUIRED if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of this project or of nanoGPT: it lacks "
            f"{', '.join(missing)}"
        )
    checkpoint["model"] = {
        _plain_name(name): tensor
        for name, tensor in checkpoint["model"].items()
        if not name.endswith(".attn.bias")
    }
    checkpoint["best_val_loss"] = float(checkpoint.get("best_val_loss", float("inf")))
    return checkpoint


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


def load_optimizer(optimizer, model, state):
    """Continue `optimizer` from a checkpoint's `optimizer` entry -> None, or why it starts fresh.

    Learning rates, weight decay and betas stay as `optimizer` was built (they come from the
    settings); everything it accumulated comes from `state`. nanoGPT's AdamW state, ordered as its
    two groups are, is fitted to torch's Adam family parameter by parameter.
    """
    if not state:
        return "the checkpoint holds no optimizer state"
    if not state["state"]:  # saved before the first update
        return None
    built = [
        {key: group[key] for key in ("lr", "initial_lr", "weight_decay", "betas") if key in group}
        for group in optimizer.param_groups
    ]
    if not any("name" in group for group in state["param_groups"]):
        state, reason = _fit_nanogpt_state(optimizer, model, state)
        if reason:
            return reason
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):  # ours check for themselves
        if reason := _misfit(optimizer, state):
            return reason
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        return str(error)
    for group, settings in zip(optimizer.param_groups, built):
        group.update(settings)
    return None


def _misfit(optimizer, state):
    """Why a saved state of torch's Adam family does not fit, or None. Its own load_state_dict
    looks at the number of parameters alone, and takes averages of any shape."""
    for saved, own in zip(state["param_groups"], optimizer.param_groups):
        for index, p in zip(saved["params"], own["params"]):
            for name, value in state["state"].get(index, {}).items():
                if name != "step" and value.shape != p.shape:
                    return f"{name} of a weight {tuple(p.shape)} is {tuple(value.shape)}"
    return None


def _fit_nanogpt_state(optimizer, model, state):
    """nanoGPT's optimizer state in the order of this optimizer's groups -> (state, reason)."""
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return None, f"nanoGPT's AdamW state does not fit {type(optimizer).__name__}"
    parameters = [p for p in model.parameters() if p.requires_grad]
    in_order = [p for p in parameters if p.dim() >= 2] + [p for p in parameters if p.dim() < 2]
    indices = [i for group in state["param_groups"] for i in group["params"]]
    if len(indices) != len(in_order):
        return None, f"it holds {len(indices)} parameters, the model has {len(in_order)}"
    entries = {id(p): state["state"][i] for p, i in zip(in_order, indices) if i in state["state"]}
    for p in in_order:
        if id(p) in entries and entries[id(p)]["exp_avg"].shape != p.shape:
            return None, "its shapes are not the model's"
    fitted = optimizer.state_dict()
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    fitted["state"] = {i: entries[id(p)] for i, p in enumerate(flat) if id(p) in entries}
    return fitted, None
