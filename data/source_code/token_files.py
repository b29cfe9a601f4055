"""From text archives to train.bin, val.bin and meta.json, over several processes.

Every file ends with <|endoftext|>. Progress is recorded after each archive.
"""

import itertools
import json
import os

import numpy as np
from tqdm import tqdm

from data.source_code.archives import part_number, processes, read_part, say
from leangpt.system.errors import UserError
from leangpt.system.whole_files import write_whole
from leangpt.text.folder import GPT2_VOCAB_SIZE, changing, write_meta
from leangpt.text.sources import gpt2_encoding

SPLITS = ("val", "train")  # as the archives have them
BATCH = 64  # files that a process is given at a time


def make_token_files(parts, folder, settings):
    """Write the dataset from the archives `parts`; where it is there already, say so.

    Raises UserError where the archives at hand do not reach `settings.tokens`.
    """
    wanted = {"val": settings.val_tokens, "train": settings.tokens}
    total = int(parts[0].name.removesuffix(".tar.xz").split("-")[-1])
    identity = {"tokens": wanted, "parts": total}
    if _is_made(folder, identity):
        say(f"{folder} is prepared already")
        return
    numbers = [part_number(path) for path in parts]
    have = next((n for n in range(1, total + 1) if n not in numbers), total + 1) - 1
    progress = _read_progress(folder, identity)
    files = {split: open(folder / f"{split}.part", "ab") for split in SPLITS}
    try:
        for split, file in files.items():  # what was written after the last record is redone
            file.truncate(2 * progress[split])
        gpt2_encoding()  # fetched once, not by each process
        with processes(settings.processes, _load_encoding) as pool:
            for path in parts[progress["parts"] : have]:
                if wanted["train"] is not None and progress["train"] >= wanted["train"]:
                    break
                _append(path, pool, files, progress, wanted)
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                progress["parts"] += 1
                write_whole(folder / "progress.json", json.dumps(progress).encode())
    finally:
        for file in files.values():
            file.close()
    if progress["train"] < (wanted["train"] or 0) or wanted["train"] is None and have < total:
        needed = "all" if wanted["train"] is None else f"{wanted['train']:,}"
        raise UserError(
            f"{needed} training tokens are wanted; the {have} of {total} archives "
            f"here hold {progress['train']:,}: lower --tokens, or bring the others"
        )
    _finish(folder, identity, progress)


def _append(path, pool, files, progress, wanted):
    """Write one archive's tokens, as far as they are wanted."""
    bar = tqdm(desc=path.name, unit=" tokens", unit_scale=True, disable=None, leave=False)
    with bar:
        for split, tokens in pool.imap(_encode, _batches(read_part(path))):
            if wanted[split] is not None:
                tokens = tokens[: wanted[split] - progress[split]]
            files[split].write(tokens.tobytes())
            progress[split] += len(tokens)
            bar.update(len(tokens))
            if split == "train" and progress[split] == wanted[split]:
                break  # the rest of the archive is not read
    say(
        f"tokenized {path.name}: {progress['val']:,} validation and {progress['train']:,} "
        "training tokens so far"
    )


def _batches(files):
    """(split, text), ... -> (split, [text, ...]) of at most BATCH files, in order."""
    for split, group in itertools.groupby(files, key=lambda pair: pair[0]):
        while texts := [text for _, text in itertools.islice(group, BATCH)]:
            yield split, texts


_encoding = None  # of this process


def _load_encoding():
    global _encoding
    _encoding = gpt2_encoding()


def _encode(batch):
    """(split, [text, ...]) -> (split, uint16 tokens, each text's with an end-of-text token)."""
    split, texts = batch
    rows = [[*_encoding.encode_ordinary(text), _encoding.eot_token] for text in texts]
    return split, np.fromiter(itertools.chain.from_iterable(rows), dtype=np.uint16)


def _is_made(folder, identity):
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (FileNotFoundError, ValueError):
        return False
    return meta.get("made_of") == identity


def _read_progress(folder, identity):
    try:
        progress = json.loads((folder / "progress.json").read_text())
    except (FileNotFoundError, ValueError):
        progress = {}
    fresh = {"identity": identity, "parts": 0, "val": 0, "train": 0}
    if progress.get("identity") != identity:
        return fresh
    for split in SPLITS:  # killed between its last two writes: begin again
        part, size = folder / f"{split}.part", 2 * progress[split]
        if size and not (part.is_file() and part.stat().st_size >= size):
            return fresh
    return progress


def _finish(folder, identity, progress):
    """Give the files their names and write meta.json last."""
    for split in SPLITS:
        if progress[split] < 2:
            raise UserError(f"{progress[split]} {split} tokens: too few for a dataset")
    with changing(folder):
        for split in SPLITS:
            if (folder / f"{split}.part").exists():
                os.replace(folder / f"{split}.part", folder / f"{split}.bin")
        meta = write_meta(
            folder,
            {
                "tokenizer": "gpt2",
                "vocab_size": GPT2_VOCAB_SIZE,
                "source": "source code of Debian 12",
                "made_of": identity,
            },
        )
    (folder / "progress.json").unlink()
    say(
        f"wrote {folder}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens, "
        f"val.bin sha256 {meta['files']['val.bin']['sha256'][:12]}"
    )
