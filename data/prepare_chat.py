"""Conversations of your own as a dataset, in a model's own chat format: writes data/NAME.

    python data/prepare_chat.py --input data/example_chat.jsonl --model data/smollm2 --name mychat
    python train.py --init_from=data/smollm2 --dataset=mychat --block_size=... (as it will say)

Each line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}, ...]}. Only the assistant's tokens have a loss. A row of the dataset is one
conversation, padded: attention never crosses from one into another. Every tenth conversation is for
validation, or all of --val's.
"""

import re
import sys
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import parse_config  # noqa: E402
from leangpt.system.errors import UserError, exit_cleanly  # noqa: E402
from leangpt.text.chat_rows import (  # noqa: E402
    TOO_LONG,
    Counts,
    conversation_rows,
    fit_rows,
    padded,
)
from leangpt.text.folder import one_at_a_time, write_dataset  # noqa: E402
from leangpt.text.tokens import FileTokenizer  # noqa: E402
from leangpt.weights.chat_text import load_pretrained_text  # noqa: E402

VAL_EVERY = 10  # conversations


@dataclass
class Settings:
    """Prepare conversations of your own."""

    input: str | None = None  # a JSONL file of conversations (needed)
    model: str | None = None  # whose chat format and tokens: a folder, GGUF file or hub id (needed)
    name: str | None = None  # the dataset's name: a folder under data/ (needed)
    val: str | None = None  # a JSONL file for validation; None: every tenth conversation of input
    block_size: int | None = None  # tokens a row; None: those of the longest conversation
    too_long: str = "refuse"  # refuse | cut | drop: conversations of more tokens than a row has
    data_dir: str = str(ROOT / "data")  # where the dataset's folder goes


def main():
    settings, _ = parse_config(Settings, config_files=False)
    if None in (settings.input, settings.model, settings.name):
        raise UserError("needed: --input FILE.jsonl --model MODEL --name NAME")
    if not re.fullmatch(r"\w[\w.-]*", settings.name):
        raise UserError(f"--name={settings.name}: use letters, digits, dots, dashes, underscores")
    if settings.too_long not in TOO_LONG:
        raise UserError(f"--too_long={settings.too_long}: use {', '.join(TOO_LONG)}")
    if settings.block_size is not None and settings.block_size < 2:
        raise UserError(f"--block_size={settings.block_size}: a row has at least 2 tokens")
    directory = Path(settings.data_dir) / settings.name
    if (directory / "prepare.py").is_file():
        raise UserError(f"{directory} has a prepare.py of its own: choose another --name")
    text = load_pretrained_text(settings.model, text_only=True)
    if not isinstance(text.tokenizer, FileTokenizer) or text.template is None:
        raise UserError(f"{settings.model} has no chat format: take a model that was made to chat")
    with one_at_a_time(directory):
        prepare(settings, text, directory)


def prepare(settings, text, directory):
    """Read, check and write; prints what became of the conversations."""
    counts = Counts()
    files = [settings.input] + ([settings.val] if settings.val else [])
    made = [list(conversation_rows(path, text, counts)) for path in files]
    row_tokens = (settings.block_size or counts.longest - 1) + 1
    made = [list(fit_rows(rows, row_tokens, settings.too_long, counts)) for rows in made]
    if settings.too_long == "refuse" and counts.lines:
        raise UserError(
            f"conversations of up to {counts.longest:,} tokens do not fit rows of {row_tokens:,} "
            f"(the first: line {counts.lines[0]}): raise --block_size, or say "
            "--too_long=cut or --too_long=drop"
        )
    train, val = made if settings.val else split(made[0])
    if not train or not val:
        raise UserError("too few conversations: at least one is needed for training and validation")
    train, val = ([row for rows in part for row in rows] for part in (train, val))
    padding = text.stop_tokens[0] if text.stop_tokens else 0
    digest = sha256(b"".join(Path(path).read_bytes() for path in files)).hexdigest()
    meta = {
        "tokenizer": "model",
        "vocab_size": text.tokenizer.vocab_size,
        "source": ", ".join(map(str, files)),
        "sha256": digest,
        "row_tokens": row_tokens,
        "dtype": "uint32",
        "conversations": {k: v for k, v in asdict(counts).items() if k != "lines"},
        "text_files": text.files,
    }
    parts = [padded(rows, row_tokens, padding) for rows in (train, val)]
    write_dataset(directory, *parts, meta)
    print(report(counts, len(train), len(val), row_tokens, directory, sum(map(np.size, parts))))


def split(conversations):
    """(train, val): every tenth conversation, or the last of fewer, is for validation."""
    held = set(range(VAL_EVERY - 1, len(conversations), VAL_EVERY)) or {len(conversations) - 1}
    return (
        [rows for i, rows in enumerate(conversations) if i not in held],
        [rows for i, rows in enumerate(conversations) if i in held],
    )


def report(counts, train, val, row_tokens, directory, size):
    """What was made, and what of the conversations was not taken as it was."""
    filled = f"{100 * counts.tokens / size:.0f}% filled"
    lines = [
        f"{counts.conversations:,} conversations: {train:,} rows for training, {val:,} to validate",
        f"rows of {row_tokens - 1:,} tokens, one conversation each and the rest padding: {filled}",
        f"{counts.answered:,} of {counts.tokens:,} tokens are the assistant's and have a loss",
    ]
    if counts.split:
        lines.append(
            f"{counts.split:,} conversations became a row an answer: their chat format writes "
            "earlier turns otherwise"
        )
    if counts.cut:
        lines.append(f"{counts.cut:,} rows were cut, being longer")
    if counts.dropped:
        lines.append(f"{counts.dropped:,} rows were dropped: too long, or nothing to learn left")
    if counts.endless:
        lines.append(
            f"{counts.endless:,} rows have an answer that no stop token ends: the model will not "
            "learn to stop there"
        )
    flags = f"--dataset={directory.name} --block_size={row_tokens - 1}"
    lines.append(f"wrote {directory}; train with {flags}")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_cleanly(main)
