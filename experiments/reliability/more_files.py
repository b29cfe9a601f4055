"""More of what a world has: a sharded run, one model with other vocabularies, conversations."""

import json
import shutil
import struct
from pathlib import Path

import torch

from experiments.reliability.processes import run_in

SHARDED = "sharded/shards-"  # what the files of the run's only checkpoint begin with
SPACE = "\u2581"


def make_more(folder: Path, flags):
    """Write them to a world's folder. flags: of a tiny run."""
    sharded(folder, flags)
    for name in ("bpe", "spm"):
        shutil.copytree(folder / "llama", folder / f"llama-{name}")
        (folder / f"llama-{name}" / "tokenizer.json").unlink()
    vocabulary = json.loads((folder / "llama" / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = [piece.replace(" ", "\u0120") for piece in vocabulary]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    (folder / "llama-bpe" / "vocab.json").write_text(json.dumps(numbers))
    (folder / "llama-bpe" / "merges.txt").write_text("#version: 0.2\nt h\n")
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    parts = [
        (1, message([(1, piece.replace(" ", SPACE)), (2, -float(i)), (3, kinds.get(piece, 1))]))
        for i, piece in enumerate(vocabulary)
    ]
    parts += [(2, message([(3, 2)])), (3, message([(1, "identity")]))]
    (folder / "llama-spm" / "tokenizer.model").write_bytes(message(parts))
    turns = [{"role": r, "content": t} for r, t in (("user", "hello"), ("assistant", "good day"))]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 12)


def sharded(folder, flags):
    """A run of two processes, of whose checkpoints the best is left."""
    words = ["train.py", *flags, "--n_embd=32", "--out_dir=sharded", "--parallel=fsdp"]
    ended = run_in(2, [*words, "--gradient_accumulation_steps=2"], folder)
    if ended.status:
        raise RuntimeError(f"the world cannot be made: {ended.err}")
    best = torch.load(folder / "sharded" / "ckpt.pt", weights_only=True)["shards"]["folder"]
    (folder / "sharded" / "ckpt_last.pt").unlink()
    for path in (folder / "sharded").glob("shards-*"):
        if path.name != best:
            shutil.rmtree(path)
    (folder.with_name(f"{folder.name}-rank1")).unlink(missing_ok=True)


def message(fields):
    """Protobuf's bytes of [(number, value)]: ints, floats of 32 bits, texts, bytes."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
