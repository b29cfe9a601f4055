"""Token files, batches and tokenizers: everything the scripts know about data.

A dataset is a folder that a prepare script filled:

    train.bin, val.bin   token ids, raw uint16 (nanoGPT's format)
    meta.json            tokenizer ("char" | "gpt2" | "file"), vocab_size, source, sha256, counts

nanoGPT's own folders load too: with its meta.pkl (characters), or with neither file (GPT-2 BPE).
"""

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.sources import gpt2_encoding, write_atomically
from errors import UserError

GPT2_VOCAB_SIZE = 50257
MAX_VOCAB_SIZE = 65535  # .bin files are uint16


@dataclass(frozen=True)
class Dataset:
    """One prepared dataset; `train` and `val` are read-only uint16 memory maps of token ids."""

    name: str
    directory: Path
    train: np.ndarray
    val: np.ndarray
    meta: dict

    @property
    def vocab_size(self):
        """Number of different token ids."""
        return self.meta["vocab_size"]

    @property
    def source(self):
        """Where the text came from, in words."""
        return self.meta.get("source", "unknown")

    @property
    def sha256(self):
        """Hex digest of the prepared text, or None where the prepare script recorded none."""
        return self.meta.get("sha256")

    def split(self, name):
        """The token ids of split `name`: "train" or "val"."""
        if name not in ("train", "val"):
            raise UserError(f"unknown split {name!r}: use train or val")
        return getattr(self, name)

    def batch(self, split, batch_size, block_size, generator=None, device="cpu"):
        """Random windows: x (B, T) and y (B, T), int64 on `device`, y being x one token on.

        Only `generator` (a CPU torch.Generator) decides which windows, so that a run's data order
        depends on nothing else. Raises UserError where the split is shorter than T + 1 tokens.
        """
        tokens = self._long_enough(split, block_size)
        last = len(tokens) - block_size
        starts = torch.randint(last, (batch_size, 1), generator=generator).numpy()
        windows = tokens[starts + np.arange(block_size + 1)]  # (B, T + 1)
        return _to_device(windows, device)

    def full_split_batches(self, split, block_size, batch_size, device="cpu"):
        """Yield (x, y), each (b, T) int64 with b <= B, over the whole split in order.

        Blocks of T tokens follow one another without overlap; every block weighs the same, so a
        mean over blocks is the split's loss. The last batch may have fewer rows, and fewer than
        T + 1 tokens at the very end are left out.
        """
        tokens = self._long_enough(split, block_size)
        blocks = (len(tokens) - 1) // block_size
        for first in range(0, blocks, batch_size):
            starts = np.arange(first, min(first + batch_size, blocks))[:, None] * block_size
            yield _to_device(tokens[starts + np.arange(block_size + 1)], device)

    def tokenizer(self):
        """The tokenizer this dataset was prepared with."""
        return load_tokenizer(self)

    def _long_enough(self, split, block_size):
        tokens = self.split(split)
        if len(tokens) <= block_size:
            raise UserError(
                f"the {split} split of {self.name} has {len(tokens)} tokens, too few for "
                f"block_size={block_size}: lower block_size or prepare more text"
            )
        return tokens


def load_dataset(name, data_dir="data"):
    """Open the dataset in `data_dir/name`.

    Raises UserError where it is not prepared (naming the command that prepares it), where its
    files disagree with one another, or where a token id lies outside the vocabulary.
    """
    directory = Path(data_dir) / name
    splits = [_open_tokens(directory, split) for split in ("train", "val")]
    meta = _read_meta(directory)
    vocab_size = meta["vocab_size"]
    for split, tokens in zip(("train", "val"), splits):
        expected = meta.get(f"{split}_tokens", len(tokens))
        if len(tokens) != expected:
            raise UserError(
                f"{directory / split}.bin holds {len(tokens)} tokens but meta.json says {expected}:"
                f" {_prepare_hint(directory)}"
            )
        largest = int(tokens[:1_000_000].max(initial=0))  # a look, not a scan of gigabytes
        if largest >= vocab_size:
            raise UserError(
                f"{directory / split}.bin holds token {largest} but the vocabulary has "
                f"{vocab_size}: {_prepare_hint(directory)}"
            )
    return Dataset(name, directory, *splits, meta)


def read_uint16(path):
    """A .bin file as a read-only uint16 memory map (an empty array for an empty file)."""
    if os.path.getsize(path) == 0:
        return np.zeros(0, dtype=np.uint16)
    return np.memmap(path, dtype=np.uint16, mode="r")


def check_vocab_size(vocab_size):
    """Raise UserError where token ids of this vocabulary do not fit the .bin files' uint16."""
    if not isinstance(vocab_size, int) or not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {vocab_size} does not fit the uint16 token files: "
            f"it must be between 1 and {MAX_VOCAB_SIZE}"
        )


def _open_tokens(directory, split):
    path = directory / f"{split}.bin"
    if not path.is_file():
        raise UserError(f"{path} is missing: {_prepare_hint(directory)}")
    if os.path.getsize(path) % 2:
        raise UserError(f"{path} has an odd number of bytes, so it is not uint16: "
                        f"{_prepare_hint(directory)}")
    return read_uint16(path)


def _prepare_hint(directory):
    """The command that prepares the dataset in this folder."""
    script = directory / "prepare.py"
    if script.is_file():
        return f"run  python {script}"
    return f"run  python data/prepare_text.py --input FILE --name {directory.name}"


def _read_meta(directory):
    """The folder's meta.json, or nanoGPT's meta.pkl turned into the same, checked."""
    if (directory / "meta.json").is_file():
        path = directory / "meta.json"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}): {_prepare_hint(directory)}") from error
        if not isinstance(meta, dict) or "vocab_size" not in meta or "tokenizer" not in meta:
            raise UserError(f"{path} lacks vocab_size or tokenizer: {_prepare_hint(directory)}")
    elif (directory / "meta.pkl").is_file():
        meta = _read_meta_pickle(directory / "meta.pkl")
    else:  # nanoGPT writes no meta file for its GPT-2 BPE datasets
        meta = {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB_SIZE,
                "source": "no meta file: taken to be GPT-2 BPE tokens"}
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
    return {"tokenizer": "char", "vocab_size": len(characters), "characters": characters,
            "source": f"prepared elsewhere ({path})"}


def _to_device(windows, device):
    """(B, T + 1) uint16 -> x (B, T), y (B, T), int64, copied without waiting where that helps."""
    windows = torch.from_numpy(windows.astype(np.int64))
    x, y = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    if torch.device(device).type == "cuda":
        return (x.pin_memory().to(device, non_blocking=True),
                y.pin_memory().to(device, non_blocking=True))
    return x.to(device), y.to(device)


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
            raise UserError(f"{path} needs the tokenizers package: "
                            "pip install tokenizers") from error
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
    directory = Path()
    if isinstance(source, Dataset):
        directory, meta = source.directory, source.meta
    elif isinstance(source, dict):
        meta = source
    else:
        directory = Path(source)
        meta = _read_meta(directory)
    kind = meta.get("tokenizer")
    if kind == "char":
        return CharTokenizer(meta["characters"])
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "file":
        return FileTokenizer(directory / meta["path"])
    raise UserError(f"unknown tokenizer {kind!r}: it must be char, gpt2 or file")


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
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "meta.json").unlink(missing_ok=True)
    (directory / "meta.pkl").unlink(missing_ok=True)
    for split, ids in splits.items():
        write_atomically(directory / f"{split}.bin", ids.astype(np.uint16).tobytes())
    if meta["tokenizer"] == "char":  # for nanoGPT's own readers
        characters = meta["characters"]
        pickled = {"vocab_size": len(characters), "itos": dict(enumerate(characters)),
                   "stoi": {character: i for i, character in enumerate(characters)}}
        write_atomically(directory / "meta.pkl", pickle.dumps(pickled))
    meta = meta | {f"{split}_tokens": len(ids) for split, ids in splits.items()}
    write_atomically(directory / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
    return meta


def describe(dataset):
    """One line for a script's start-up summary."""
    digest = f", sha256 {dataset.sha256[:12]}" if dataset.sha256 else ""
    return (f"{dataset.name}: {len(dataset.train):,} train and {len(dataset.val):,} val tokens, "
            f"vocabulary {dataset.vocab_size}, from {dataset.source}{digest}")
