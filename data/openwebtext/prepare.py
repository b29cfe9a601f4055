"""OpenWebText in GPT-2's byte-pair encoding: writes train.bin (about 18 GB) and val.bin here.

    pip install datasets
    python data/openwebtext/prepare.py                        # streamed: no 54 GB download first
    python data/openwebtext/prepare.py --input docs.jsonl     # your own documents instead

Documents are read one chunk at a time, so memory stays at some hundred MB whatever the size.
Progress is saved after every chunk: kill it at any moment and run it again, and it goes on from
there to the same bytes. Every document ends with <|endoftext|>; one in `val_every` is validation.
"""

import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from configurator import parse_config  # noqa: E402
from data.prepare_text import report_if_prepared  # noqa: E402
from leangpt.system.errors import UserError, exit_cleanly, refused  # noqa: E402
from leangpt.system.whole_files import write_whole  # noqa: E402
from leangpt.text.folder import SPLITS, changing, one_at_a_time, write_meta  # noqa: E402
from leangpt.text.sources import gpt2_encoding  # noqa: E402

HUB_NAME = "Skylion007/openwebtext"


@dataclass
class Settings:
    """Prepare OpenWebText, or documents of your own, with GPT-2's tokenizer."""

    input: str | None = None  # .jsonl ({"text": ...} a line) or .txt (one document a line)
    max_documents: int | None = None  # stop after so many; None: all of them
    val_every: int = 2000  # one document in so many is validation (nanoGPT: 0.05%)
    chunk: int = 1000  # documents tokenized, written and recorded at a time
    out_dir: str = str(Path(__file__).resolve().parent)  # the dataset's folder

    def __post_init__(self):
        if self.val_every < 2 or self.chunk < 1:
            raise UserError("val_every must be at least 2 and chunk at least 1")


def main(argv=None):
    config, _ = parse_config(Settings, argv, config_files=False)
    directory = Path(config.out_dir)
    with one_at_a_time(directory):
        if not report_if_prepared(directory, {"tokenizer": "gpt2"}):
            prepare(config, directory)


def prepare(config, directory):
    """Tokenize the documents into `directory`, from where an earlier run got to."""
    documents = local_documents(config.input) if config.input else hub_documents()
    try:
        progress = read_progress(directory, config)
        if not progress["complete"]:
            tokenize(documents, directory, config, progress)
        finish(directory, config, progress)
    except OSError as error:  # disk full, folder not writable, network gone
        raise refused(f"run it again to go on from {directory}", error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{config.input} is not UTF-8 text ({error.reason}): convert it") from error


# ---- documents: functions of how many to skip -> an iterator over texts -------------------------


def local_documents(path):
    """The documents of a .jsonl or .txt file."""
    if not os.path.isfile(path):
        raise UserError(f"no such file: {path}")

    def read(skip):
        with open(path, encoding="utf-8-sig") as file:
            lines = (line for line in enumerate(file, 1) if line[1].strip())
            for number, line in itertools.islice(lines, skip, None):
                if not path.endswith(".jsonl"):
                    yield line.rstrip("\n")
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(f'{path}, line {number}: not a JSON object with a "text"')
                yield text

    return read


def hub_documents():
    """OpenWebText, streamed from the Hugging Face hub."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            "OpenWebText needs the datasets package: pip install datasets "
            "(or give documents of your own with --input FILE.jsonl)"
        ) from error

    def read(skip):
        try:
            stream = load_dataset(HUB_NAME, split="train", streaming=True).skip(skip)
        except OSError as error:
            raise UserError(f"{HUB_NAME} cannot be reached: {error}") from error
        for row in stream:
            yield row["text"]

    return read


# ---- tokens -------------------------------------------------------------------------------------


def read_progress(directory, config):
    """How far an earlier run came, or the start. Raises UserError if it had other settings."""
    identity = {
        "input": config.input and os.path.abspath(config.input),
        "max_documents": config.max_documents,
        "val_every": config.val_every,
    }
    try:
        progress = json.loads((directory / "progress.json").read_text())
    except FileNotFoundError:
        return {"documents": 0, "train_tokens": 0, "val_tokens": 0, "complete": False} | identity
    if any(progress[key] != value for key, value in identity.items()):
        raise UserError(
            f"{directory} holds an unfinished run with other settings: repeat those, "
            "or delete progress.json there to start again"
        )
    return progress


def tokenize(documents, directory, config, progress):
    """Append the tokens of all remaining documents to the .part files, recording each chunk."""
    encoding = gpt2_encoding()
    files = {split: open(directory / f"{split}.part", "ab") for split in SPLITS}
    for split, file in files.items():  # what was written after the last record is written again
        file.truncate(2 * progress[f"{split}_tokens"])
    limit = config.max_documents
    remaining = itertools.islice(
        documents(progress["documents"]), limit and limit - progress["documents"]
    )
    with tqdm(total=limit, initial=progress["documents"], unit=" docs", disable=None) as bar:
        while texts := list(itertools.islice(remaining, config.chunk)):
            rows = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
            for row in rows:
                split = "val" if progress["documents"] % config.val_every == 0 else "train"
                row.append(encoding.eot_token)
                files[split].write(np.array(row, dtype=np.uint16).tobytes())
                progress["documents"] += 1
                progress[f"{split}_tokens"] += len(row)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            record(directory, progress)
            bar.update(len(texts))
    for file in files.values():
        file.close()


def finish(directory, config, progress):
    """Give the files their names and write meta.json; may itself be interrupted and repeated."""
    for split in SPLITS:
        if progress[f"{split}_tokens"] < 2:
            raise UserError(
                f"{progress['documents']} documents gave no {split} tokens: "
                "prepare more of them, or lower val_every"
            )
    progress["complete"] = True
    record(directory, progress)
    meta = {
        "tokenizer": "gpt2",
        "vocab_size": 50257,
        "source": Path(config.input).name if config.input else HUB_NAME,
        "source_reason": "--input names it" if config.input else "it is OpenWebText",
        "documents": progress["documents"],
    }
    with changing(directory):
        for split in SPLITS:
            if (directory / f"{split}.part").exists():
                os.replace(directory / f"{split}.part", directory / f"{split}.bin")
        meta = write_meta(directory, meta)
    (directory / "progress.json").unlink()
    print(
        f"wrote {directory}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val "
        f"tokens of {meta['documents']:,} documents"
    )


def record(directory, progress):
    """Save how far the run is, after the tokens it speaks of have reached the disk."""
    write_whole(directory / "progress.json", json.dumps(progress).encode())


if __name__ == "__main__":
    exit_cleanly(main)
