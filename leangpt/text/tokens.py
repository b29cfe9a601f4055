"""Tokenizers, and the files of a prepared dataset: what the prepare scripts write.

    train.bin, val.bin   token ids, raw uint16 (nanoGPT's format)
    meta.json            tokenizer ("char" | "gpt2" | "file"), vocab_size, source, sha256, counts
    meta.pkl             nanoGPT's own character vocabulary, for its readers

Nothing here needs torch, so preparing data starts at once; dataset.py makes batches of the files.
"""

import json
import os
import pickle
from pathlib import Path

import numpy as np

from leangpt.system.errors import UserError
from leangpt.system.whole_files import write_whole
from leangpt.text.sources import gpt2_encoding

GPT2_VOCAB_SIZE = 50257
MAX_VOCAB_SIZE = 65535  # .bin files are uint16


# ---- tokenizers: encode(str) -> list[int], decode(list[int]) -> str, vocab_size -----------------


class CharTokenizer:
    """One token a character; ids follow the order of `characters`."""

    def __init__(self, characters):
        self.characters = characters
        self.ids = {character: i for i, character in enumerate(characters)}
        self.vocab_size = len(characters)

    def encode(self, text):
        """Raises UserError naming the characters that the vocabulary lacks."""
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            named = " ".join(repr(character) for character in unknown[:10])
            raise UserError(
                f"the vocabulary of {self.vocab_size} characters lacks {named}"
                f"{' ...' if len(unknown) > 10 else ''}: leave them out or replace them"
            )
        return [self.ids[character] for character in text]

    def decode(self, ids):
        """Ids beyond the vocabulary (a model may be padded) read as U+FFFD."""
        size = self.vocab_size
        return "".join(self.characters[i] if 0 <= i < size else "\ufffd" for i in ids)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding through tiktoken; `<|endoftext|>` in a text is the one token."""

    vocab_size = GPT2_VOCAB_SIZE

    def __init__(self):
        self.encoding = gpt2_encoding()

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={"<|endoftext|>"})

    def decode(self, ids):
        """Ids beyond the vocabulary (nanoGPT pads it to 50304) are left out."""
        return self.encoding.decode([i for i in ids if 0 <= i < self.vocab_size])


class FileTokenizer:
    """Any Hugging Face tokenizer.json, through the `tokenizers` package."""

    def __init__(self, path):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"{path} needs the tokenizers package: pip install tokenizers"
            ) from error
        if not os.path.isfile(path):
            raise UserError(f"no tokenizer file {path}")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises a bare Exception for every bad file
            raise UserError(f"{path} is not a tokenizer.json: {error}") from error
        self.vocab_size = self.tokenizer.get_vocab_size()

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(source):
    """The tokenizer of a Dataset, of a dataset folder, or of a meta dict (as checkpoints carry).

    A meta dict is {"tokenizer": "gpt2"}, {"tokenizer": "char", "characters": "..."} or
    {"tokenizer": "file", "path": "tokenizer.json"}, the path seen from the dataset's folder.
    """
    if isinstance(source, dict):
        directory, meta = Path(), source
    elif isinstance(source, (str, Path)):
        directory, meta = Path(source), read_meta(Path(source))
    else:
        directory, meta = source.directory, source.meta
    kind = meta.get("tokenizer")
    needed = {"char": "characters", "file": "path"}.get(kind)
    if needed and not isinstance(meta.get(needed), str):
        raise UserError(
            f"the meta data names the tokenizer {kind!r} but gives no {needed!r}: "
            "prepare the dataset again"
        )
    if kind == "char":
        return CharTokenizer(meta["characters"])
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "file":
        return FileTokenizer(directory / meta["path"])
    raise UserError(f"unknown tokenizer {kind!r}: it must be char, gpt2 or file")


# ---- reading a folder's meta file ---------------------------------------------------------------


def read_meta(directory):
    """The folder's meta.json, or nanoGPT's meta.pkl turned into the same, checked."""
    if (directory / "meta.json").is_file():
        path = directory / "meta.json"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}): {prepare_hint(directory)}") from error
        if not isinstance(meta, dict) or "vocab_size" not in meta or "tokenizer" not in meta:
            raise UserError(f"{path} lacks vocab_size or tokenizer: {prepare_hint(directory)}")
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
    check_vocab_size(meta["vocab_size"])
    return meta


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers; refuses everything that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_meta_pickle(path):
    try:
        with open(path, "rb") as file:
            pickled = _PlainUnpickler(file).load()
        itos = pickled["itos"]
        characters = "".join(itos[i] for i in range(pickled["vocab_size"]))
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a character vocabulary of nanoGPT's: {error}") from error
    return {
        "tokenizer": "char",
        "vocab_size": len(characters),
        "characters": characters,
        "source": f"prepared elsewhere ({path})",
    }


def prepare_hint(directory):
    """The command that prepares the dataset in this folder."""
    script = directory / "prepare.py"
    if script.is_file():
        return f"run  python {script}"
    return f"run  python data/prepare_text.py --input FILE --name {directory.name}"


def check_vocab_size(vocab_size):
    """Raise UserError where token ids of this vocabulary do not fit the .bin files' uint16."""
    if not isinstance(vocab_size, int) or not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {vocab_size} does not fit the uint16 token files: "
            f"it must be between 1 and {MAX_VOCAB_SIZE}"
        )


# ---- writing: what every prepare script ends with -----------------------------------------------


def write_dataset(directory, train_ids, val_ids, meta):
    """Write train.bin, val.bin, meta.pkl (characters only) and, last, meta.json.

    Each file appears under its name only when it is whole, and meta.json only when all are, so a
    folder with a meta.json is a prepared one. Ids are integers below meta["vocab_size"] <= 65535.
    Returns the meta dict as written, with the token counts.
    """
    check_vocab_size(meta["vocab_size"])
    splits = {"train": np.asarray(train_ids), "val": np.asarray(val_ids)}
    for split, ids in splits.items():
        if len(ids) < 2:
            raise UserError(f"the text is too short: its {split} split has {len(ids)} tokens")
        if ids.min() < 0 or ids.max() >= meta["vocab_size"]:
            raise ValueError(f"{split} holds ids outside the vocabulary of {meta['vocab_size']}")
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "meta.json").unlink(missing_ok=True)
        (directory / "meta.pkl").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from error
    for split, ids in splits.items():
        write_whole(directory / f"{split}.bin", ids.astype(np.uint16).tobytes())
    if meta["tokenizer"] == "char":  # for nanoGPT's own readers
        characters = meta["characters"]
        pickled = {
            "vocab_size": len(characters),
            "itos": dict(enumerate(characters)),
            "stoi": {character: i for i, character in enumerate(characters)},
        }
        write_whole(directory / "meta.pkl", pickle.dumps(pickled))
    meta = meta | {f"{split}_tokens": len(ids) for split, ids in splits.items()}
    write_whole(directory / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
    return meta
