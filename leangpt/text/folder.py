"""The folder of a prepared dataset: its files, what they say of themselves, how they come to be.

    train.bin, val.bin   token ids, raw uint16 (nanoGPT's format), or uint32 as meta.json's "dtype"
    meta.json            tokenizer ("char" | "gpt2" | "file" | "model"), vocab_size, source, counts,
                         and the size and sha256 of each .bin file; "row_tokens" where they are rows
                         of so many tokens that belong to nothing else (chat_rows.py)
    tokenizer.json, ...  with "model": that model's text files (text_files.py)
    meta.pkl             nanoGPT's own character vocabulary, for its readers
    INCOMPLETE           only while files change, or after that was interrupted: no reader goes on

Nothing here needs torch; dataset.py makes batches of the files.
"""

import contextlib
import json
import pickle
from pathlib import Path

import numpy as np

from leangpt.system.errors import UserError, refused
from leangpt.system.lock import FolderLock
from leangpt.system.whole_files import write_whole
from leangpt.text.integrity import TYPES, digest_and_largest
from leangpt.text.text_files import read_text_files, write_text_files

GPT2_VOCAB_SIZE = 50257
MAX_VOCAB_SIZE = {"uint16": 65535, "uint32": 2**31 - 1}  # by the type of .bin files
TOKEN_BYTES = {"uint16": 2, "uint32": 4}
SPLITS = ("train", "val")
MARK = "INCOMPLETE"
MARK_TEXT = "A prepare script was changing this folder. If none runs, run it again.\n"


def read_meta(directory):
    """The folder's meta.json, or nanoGPT's meta.pkl turned into the same, checked.

    Raises UserError where the folder is not prepared, or not to its end.
    """
    check_whole(directory)
    if (directory / "meta.json").is_file():
        path = directory / "meta.json"
        try:
            meta = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}): {prepare_hint(directory)}") from error
        _check_meta(path, meta)
    elif (directory / "meta.pkl").is_file():
        meta = _read_meta_pickle(directory / "meta.pkl")
    elif not (directory / "train.bin").is_file():
        raise UserError(f"no prepared dataset in {directory}: {prepare_hint(directory)}")
    else:  # nanoGPT writes no meta file for its GPT-2 BPE datasets
        meta = {
            "tokenizer": "gpt2",
            "vocab_size": GPT2_VOCAB_SIZE,
            "source": "no meta file: taken to be GPT-2 BPE tokens",
        }
    dtype = token_type(meta)
    if dtype not in TYPES:
        raise UserError(f"{directory}: tokens are uint16 or uint32, not {dtype!r}")
    check_vocab_size(meta["vocab_size"], dtype)
    if meta["tokenizer"] == "model":
        meta["text_files"] = read_text_files(directory)
    return meta


def token_type(meta):
    """The type of a folder's .bin files: "uint16", or what its meta data says."""
    return meta.get("dtype", "uint16")


def check_whole(directory):
    """Raise UserError where a change of the folder's files is under way, or was interrupted."""
    if (directory / MARK).exists():
        raise UserError(
            f"{directory} is being prepared, or was until that was interrupted: wait for it, or "
            f"{prepare_hint(directory)}"
        )


META_TYPES = {"source": str, "sha256": str, "train_tokens": int, "val_tokens": int, "files": dict}
META_TYPES |= {"row_tokens": int, "dtype": str, "model": str}


def _check_meta(path, meta):
    """Raise UserError where a meta.json is not what a prepare script writes."""
    hint = prepare_hint(path.parent)
    if not isinstance(meta, dict) or not isinstance(meta.get("tokenizer"), str):
        raise UserError(f"{path} lacks vocab_size or tokenizer: {hint}")
    if not isinstance(meta.get("vocab_size"), int):
        raise UserError(f"{path} lacks vocab_size or tokenizer: {hint}")
    for name, kind in META_TYPES.items():
        if meta.get(name) is not None and not isinstance(meta[name], kind):
            raise UserError(f"{path}: {name} is {meta[name]!r}, no {kind.__name__}: {hint}")
    for name, facts in meta.get("files", {}).items():
        digest = facts.get("sha256") if isinstance(facts, dict) else None
        if not isinstance(digest, str) or not isinstance(facts.get("bytes"), int):
            raise UserError(f"{path}: the entry of {name} lacks bytes or sha256: {hint}")


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers; refuses everything that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_meta_pickle(path):
    """nanoGPT's own vocabulary: characters, or pieces of any length ("table")."""
    try:
        with open(path, "rb") as file:
            pickled = _PlainUnpickler(file).load()
        itos = pickled["itos"]
        pieces = [itos[i] for i in range(len(itos))]
        if not pieces or not all(isinstance(piece, str) for piece in pieces):
            raise TypeError("its pieces are not strings")
        if pickled.get("vocab_size", len(pieces)) != len(pieces):
            raise KeyError("vocab_size differs from the number of its pieces")
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ValueError,
            ImportError, MemoryError, RecursionError) as error:  # fmt: skip
        raise UserError(f"{path} is not a vocabulary of nanoGPT's: {error}") from error
    meta = {"vocab_size": len(pieces), "source": f"prepared elsewhere ({path})"}
    if all(len(piece) == 1 for piece in pieces):
        return meta | {"tokenizer": "char", "characters": "".join(pieces)}
    return meta | {"tokenizer": "table", "pieces": pieces}


def prepare_hint(directory):
    """The command that prepares the dataset in this folder."""
    script = directory / "prepare.py"
    if script.is_file():
        return f"run  python {script}"
    return f"run  python data/prepare_text.py --input FILE --name {directory.name}"


def check_vocab_size(vocab_size, dtype="uint16"):
    """Raise UserError where token ids of this vocabulary do not fit .bin files of this type."""
    if not isinstance(vocab_size, int) or not 0 < vocab_size <= MAX_VOCAB_SIZE[dtype]:
        raise UserError(
            f"a vocabulary of {vocab_size} does not fit the {dtype} token files: "
            f"it must be between 1 and {MAX_VOCAB_SIZE[dtype]}"
        )


def write_dataset(directory, train_ids, val_ids, meta):
    """Write train.bin, val.bin, meta.pkl (characters only) and, last, meta.json.

    Ids are integers below meta["vocab_size"]; files are uint16, or uint32 where meta's "dtype" says
    so or the vocabulary needs it. Returns the meta dict as written, with the token counts. Whoever
    reads the folder meanwhile, or after a kill, is told that it is not whole.
    """
    if meta["vocab_size"] > MAX_VOCAB_SIZE["uint16"]:
        meta = {"dtype": "uint32", **meta}
    check_vocab_size(meta["vocab_size"], token_type(meta))
    meta = dict(meta)
    splits = {"train": np.asarray(train_ids), "val": np.asarray(val_ids)}
    for split, ids in splits.items():
        if len(ids) < 2:
            raise UserError(f"the text is too short: its {split} split has {len(ids)} tokens")
        if ids.min() < 0 or (ids & MAX_VOCAB_SIZE["uint32"]).max() >= meta["vocab_size"]:
            raise ValueError(f"{split} holds ids outside the vocabulary of {meta['vocab_size']}")
    directory = Path(directory)
    with changing(directory):
        for split, ids in splits.items():
            numbers = ids.astype(TYPES[token_type(meta)])
            write_whole(directory / f"{split}.bin", numbers.tobytes())
        if "text_files" in meta:
            write_text_files(meta.pop("text_files"), directory)
        if meta["tokenizer"] == "char":  # for nanoGPT's own readers
            characters = meta["characters"]
            pickled = {
                "vocab_size": len(characters),
                "itos": dict(enumerate(characters)),
                "stoi": {character: i for i, character in enumerate(characters)},
            }
            write_whole(directory / "meta.pkl", pickle.dumps(pickled))
        return write_meta(directory, meta)


@contextlib.contextmanager
def changing(directory):
    """Around whatever replaces files of a dataset: until it is done, no reader takes the folder.

    The mark is on the disk before anything else changes and goes after everything has. It stays
    where the change was not finished, whatever the reason.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / MARK, MARK_TEXT.encode())
        for name in ("meta.json", "meta.pkl"):
            (directory / name).unlink(missing_ok=True)
        yield
        (directory / MARK).unlink()
    except OSError as error:
        raise refused(f"cannot write to {directory}", error) from error


def write_meta(directory, meta):
    """Write meta.json beside train.bin and val.bin, with their counts, sizes and digests.

    Returns the dict as written. Raises UserError for a split of fewer than 2 tokens or with ids
    outside the vocabulary.
    """
    files, dtype = {}, token_type(meta)
    for split in SPLITS:
        path = directory / f"{split}.bin"
        digest, largest = digest_and_largest(path, dtype)
        size, each = path.stat().st_size, TOKEN_BYTES[dtype]
        if size < 2 * each:
            raise UserError(f"the text is too short: its {split} split has {size // each} tokens")
        if largest >= meta["vocab_size"]:
            raise UserError(f"{path} holds token {largest} of a vocabulary of {meta['vocab_size']}")
        meta = meta | {f"{split}_tokens": size // each}
        files[path.name] = {"bytes": size, "sha256": digest}
    if meta.get("sha256") is None:  # of the text, where there was one text
        meta = meta | {"sha256": files["train.bin"]["sha256"], "sha256_of": "train.bin"}
    meta = meta | {"files": files}
    write_whole(directory / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
    return meta


@contextlib.contextmanager
def one_at_a_time(directory):
    """Only one process prepares a folder: others wait here, and then see that it is done."""
    was_there = directory.exists()
    lock = FolderLock(directory, wait=lambda line: print(line, flush=True))
    try:
        yield
    finally:
        lock.release()
        if not was_there:
            with contextlib.suppress(OSError):  # unless something was written
                directory.rmdir()
