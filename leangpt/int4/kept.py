"""4-bit weights kept beside what they were rounded from: a minute to round, a second to read.

`out/ckpt.pt` has its 4-bit weights in `out/int4/`. A file says by a hash what it was rounded from,
and how; it is used for that alone, and made anew where the hash is another or the file is damaged.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from leangpt.int4.files import checksum, load_int4, save_int4
from leangpt.int4.quantize import storage_bits
from leangpt.system.cache import cache_folder
from leangpt.system.errors import UserError
from leangpt.system.lock import FolderLock

ROUNDING = 2  # another number here, and all that was kept is rounded again
FOLDER = "int4"


def read_or_round(
    model,
    source: str | Path,
    round_: Callable,
    group_size: int = 32,
    tune: int = 0,
    notes: dict | None = None,
    device="cpu",
    say: Callable[[str], None] = print,
):
    """`model` in 4 bits, on `device`: read where it was kept, or rounded and then kept.

    source: the file or folder that the model came from, or the name of anything else, whose 4-bit
    weights go to the cache folder; so do those that may not be written beside it. round_(model)
    rounds it in place. group_size, tune: what round_ does besides. notes: save_int4's. say is told
    in one line what was done. The result has the model's own settings of attention.
    """
    key = content_key(model, group_size, tune)
    with kept_file(source, f"g{group_size}" + f"-tuned{tune}" * bool(tune), say) as path:
        before = ""
        if path is not None and path.exists():
            began = time.perf_counter()
            kept, before = _read(model, path, key, device)
            if kept is not None:
                seconds = time.perf_counter() - began
                say(
                    f"{storage_bits(kept):.3g} bits per weight, rounded earlier: read {path} in "
                    f"{seconds:.1f} s"
                )
                return kept
        began = time.perf_counter()
        model.to(device)
        round_(model)
        seconds = time.perf_counter() - began
        where = _keep(model, path, {**(notes or {}), "rounded_from": key})
        say(
            f"{before}rounded to {storage_bits(model):.3g} bits per weight in {seconds:.1f} s; "
            f"{where}"
        )
    return model


def content_key(model, group_size, tune):
    """sha256 of all that decides a model's 4-bit weights: its own, its shape, how it is rounded."""
    config = asdict(model.config)
    shape = {name: value for name, value in config.items() if name not in model.config.FREE}
    recipe = [ROUNDING, group_size, tune, shape, checksum(model.state_dict())]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def kept_file(source, ending, say):
    """`with kept_file(...) as path:` the place of 4-bit weights, this process's for as long; None
    where nothing can be written. Another process that rounds the same is waited for."""
    path, lock = Path(source).expanduser(), None
    known = path.exists()
    name = "model" if path.is_dir() or not known else path.stem
    own = re.sub(r"\W+", "-", str(path.resolve() if known else source)).strip("-")
    beside = [(path if path.is_dir() else path.parent) / FOLDER] if known else []
    for folder in [*beside, cache_folder() / FOLDER / own[-100:]]:
        try:
            lock = FolderLock(folder, wait=say)
        except UserError:
            continue
        break
    try:
        yield folder / f"{name}-{ending}.safetensors" if lock else None
    finally:
        if lock:
            lock.release()


def _read(model, path, key, device):
    """(the model that was kept, "") or (None, why it is of no use, to begin a sentence with)."""
    free = {name: getattr(model.config, name) for name in model.config.FREE}
    dtype = model.transformer.wte.weight.dtype
    try:
        kept, notes = load_int4(type(model), path, device, dtype, **free)
    except UserError:
        return None, f"{path} was damaged: "
    if notes.get("rounded_from") != key:
        return None, f"{path} was rounded from other weights: "
    return kept, ""


def _keep(model, path, notes):
    """Write the file -> what to say of it."""
    if path is None:
        return "kept nowhere, no folder for it can be written"
    try:
        save_int4(model, path, notes)
    except UserError as error:  # a full disk: the text comes all the same
        return f"not kept ({error})"
    return f"kept in {path} for the next time"
