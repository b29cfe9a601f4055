"""Damaged files: cut short, bits flipped, values of wrong types.

A file with checksums is refused or means the same; a file without is read as it says, or refused.
No traceback, no hang, no crash.
"""

import copy
import json
import random
import struct

import torch

from experiments.reliability.world import GREEDY, TINY, run_result, said
from experiments.reliability.zygote import run
from leangpt.system.errors import UserError

EACH = 50  # truncations, flipped bits, wrong types of every kind of file
RESUME = ["train.py", "--init_from=resume", "--max_iters=6"]
NANO = [w for w in TINY if w != "--dataset=tiny"]


def chat(model):
    """The words that ask a model of this folder."""
    return ["sample.py", f"--init_from={model}", "--chat", "--start=hello", *GREEDY]


CHAT = chat("llama")
GGUF = ["sample.py", "--init_from=llama.gguf", "--start=hello", *GREEDY]
INT4 = ["sample.py", "--init_from=int4.safetensors", "--start=the", *GREEDY]
COMPARE = ["compare.py", "out", "adam"]
FROM_DATA = ["train.py", *TINY, "--max_iters=2"]
PREPARE = ["data/prepare_text.py", "--input=book.txt", "--name=new", "--data_dir=data"]
PREPARE_CHAT = ["data/prepare_chat.py", "--input=chat.jsonl", "--name=new", "--data_dir=data"]
PREPARE_CHAT += ["--model=llama"]
TRAIN_NANO = ["train.py", *NANO, "--dataset=nano", "--max_iters=2"]
# kind -> (file, does it carry checksums, what reads it, what that needs)
FILES = {
    "checkpoint, resumed": ("out/ckpt_last.pt", True, RESUME, ("data", "out")),
    "checkpoint, sampled": (
        "adam/ckpt.pt",
        True,
        ["sample.py", "--out_dir=adam", *GREEDY],
        ("adam",),
    ),
    "checkpoint, compared": (
        "out/ckpt_last.pt",
        False,  # its numbers are not read
        ["compare.py", "bare"],
        ("out",),
    ),
    "nanoGPT's checkpoint": (
        "nanogpt/ckpt.pt",
        True,
        ["sample.py", "--out_dir=nanogpt", *GREEDY],
        ("nanogpt", "data"),
    ),
    "metrics.csv, resumed": ("out/metrics.csv", False, RESUME, ("data", "out")),
    "metrics.csv, compared": (
        "out/metrics.csv",
        False,
        ["compare.py", "out", "adam"],
        ("out", "adam"),
    ),
    "config.json of a run": (
        "out/config.json",
        False,
        ["compare.py", "out", "adam"],
        ("out", "adam"),
    ),
    "run.json": ("out/run.json", False, COMPARE, ("out", "adam")),
    "train.bin": ("data/tiny/train.bin", True, FROM_DATA, ("data",)),
    "val.bin": ("data/tiny/val.bin", True, FROM_DATA, ("data",)),
    "meta.json": ("data/tiny/meta.json", False, FROM_DATA, ("data",)),
    "nanoGPT's train.bin": ("data/nano/train.bin", False, TRAIN_NANO, ("data",)),
    "nanoGPT's meta.pkl": ("data/nano/meta.pkl", False, TRAIN_NANO, ("data",)),
    "4-bit file": ("int4.safetensors", True, INT4, ("int4.safetensors",)),
    "safetensors": ("llama/model-00001-of-00002.safetensors", False, CHAT, ("llama",)),
    "safetensors' index": ("llama/model.safetensors.index.json", False, CHAT, ("llama",)),
    "config.json of a model": ("llama/config.json", False, CHAT, ("llama",)),
    "tokenizer.json": ("llama/tokenizer.json", False, CHAT, ("llama",)),
    "tokenizer_config.json": ("llama/tokenizer_config.json", False, CHAT, ("llama",)),
    "generation_config.json": ("llama/generation_config.json", False, CHAT, ("llama",)),
    "chat template": ("llama/chat_template.jinja", False, CHAT, ("llama",)),
    "GGUF": ("llama.gguf", False, GGUF, ("llama.gguf",)),
    "text": ("book.txt", False, PREPARE, ("book.txt",)),
}
EARLIER = len(FILES)  # kinds: their cases have the first numbers
SAMPLE_SHARDED = ["sample.py", "--out_dir=sharded", *GREEDY]
FILES |= {
    "shards": ("sharded/shards-*/__1_0.distcp", True, SAMPLE_SHARDED, ("sharded",)),
    "shards' table": ("sharded/shards-*/.metadata", True, SAMPLE_SHARDED, ("sharded",)),
    "checkpoint of shards": ("sharded/ckpt.pt", True, SAMPLE_SHARDED, ("sharded",)),
    "vocab.json": ("llama-bpe/vocab.json", False, chat("llama-bpe"), ("llama-bpe",)),
    "merges.txt": ("llama-bpe/merges.txt", False, chat("llama-bpe"), ("llama-bpe",)),
    "tokenizer.model": ("llama-spm/tokenizer.model", False, chat("llama-spm"), ("llama-spm",)),
    "conversations": ("chat.jsonl", False, PREPARE_CHAT, ("chat.jsonl", "llama")),
}
WAYS = ("cut", "bit", "type")
STRANGE = (
    *(None, True, False, 0, 1, -1, 2, 3.5, 1e308, -(2**63), 2**63, 10**30, "", "x", "1", [], [1]),
    *([None], ["x"], {}, {"x": 1}, {"default": None}, "é" * 9, "\0", [[]], 10**7),
)


def count(world):
    return EACH * len(WAYS) * len(FILES)


def case(number, world, real):
    """One case -> a row's cells."""
    way, (kind, turn) = WAYS[number % len(WAYS)], kind_and_turn(number // len(WAYS))
    name, summed, command, needed = FILES[kind]
    choose = random.Random(f"damage {number}")
    if "cut" in way and turn == 0:
        choose.random = lambda: 0.0  # the empty file is one of them
    if not list(world.pristine.glob(name)):
        return {"kind": kind, "what": way, "outcome": "unchecked", "detail": "no such package"}
    want = world.once(kind, lambda: read(world, command, needed, "reference")[1])
    folder = world.case_folder(number, *needed)
    what = damage(next(folder.glob(name)), way, choose)
    ended, found = read(world, command, needed, number, folder, real)
    outcome = ended.verdict
    if outcome == "done" and found == want:
        outcome = "same"
    elif outcome == "done" and summed and way != "type":
        outcome = "other"
    cells = {"kind": kind, "what": f"{way}: {what}", "outcome": outcome, "detail": ended.words}
    return cells | {"status": ended.status, "seconds": round(ended.seconds, 2)}


def kind_and_turn(index):
    """(kind of file, how often it has been damaged this way before) of the index-th such damage."""
    kinds = list(FILES)
    first, later = kinds[:EARLIER], kinds[EARLIER:]
    if index < EACH * EARLIER:
        return first[index % EARLIER], index // EARLIER
    index -= EACH * EARLIER
    return later[index % len(later)], index // len(later)


def read(world, command, needed, name, folder=None, real=False):
    """(how the command ended on pristine files or those in `folder`, what it came to)."""
    folder = folder or world.case_folder(name, *needed)
    if command[-1] == "bare":  # a run of which only the checkpoint is left
        (folder / "bare").mkdir()
        (folder / "out" / "ckpt_last.pt").rename(folder / "bare" / "ckpt.pt")
    ended = run(command, folder, real=real)
    found = said(ended.out)
    if command[0] == "train.py" and ended.status == 0:
        try:
            found = run_result(folder / "out")
        except (UserError, OSError) as error:
            found = str(error)
    world.forget(folder)
    return ended, found


def damage(path, way, choose) -> str:
    """Damage a file; says how."""
    content = path.read_bytes()
    if way == "type" and (changed := wrong_type(path, content, choose)):
        return changed
    if way == "bit":
        at, bit = choose.randrange(len(content)), choose.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        return f"bit {bit} of byte {at}"
    if way == "cut":
        length = int(choose.random() * len(content))
        path.write_bytes(content[:length])
        return f"{length} of {len(content)} bytes"
    at, length = choose.randrange(len(content)), choose.choice((1, 16, 512, 4096))
    filling = choose.choice((bytes, choose.randbytes))(length)
    path.write_bytes(content[:at] + filling + content[at + length :])
    return f"{length} other bytes at {at}"


def wrong_type(path, content, choose):
    """Replace a value by a strange one where the file has values; says which, '' if it has none."""
    if path.suffix == ".json":
        tree = json.loads(content)
        said = replace_one(tree, choose)
        path.write_text(json.dumps(tree))
        return said
    if path.suffix == ".pt":
        tree = torch.load(path, weights_only=True)
        said = replace_one(tree, choose)
        torch.save(tree, path)
        return said
    if path.suffix == ".safetensors":
        length = struct.unpack("<Q", content[:8])[0]
        tree = json.loads(content[8 : 8 + length])
        for name in ("model_args", "notes"):  # JSON within JSON
            if name in tree.get("__metadata__", {}) and choose.random() < 0.7:
                inner = json.loads(tree["__metadata__"][name])
                said = replace_one(inner, choose)
                tree["__metadata__"][name] = json.dumps(inner)
                break
        else:
            said = replace_one(tree, choose)
        header = json.dumps(tree).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
        return said
    if path.suffix == ".csv":
        rows = [line.split(",") for line in content.decode().splitlines()]
        row = choose.choice(rows)
        at, value = choose.randrange(len(row)), str(choose.choice(STRANGE))
        said, row[at] = f"{row[at]} -> {value}", value
        path.write_text("".join(",".join(row) + "\n" for row in rows))
        return said
    return ""


def replace_one(tree, choose):
    """Another value, or none at all, at a random place of nested dicts and lists."""
    place, path = tree, []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = choose.choice(keys)
        path.append(str(key))
        inner = place[key]
        deeper = isinstance(inner, dict | list) and len(inner) and choose.random() < 0.8
        if not deeper:
            break
        place = inner
    if choose.random() < 0.15:
        del place[key]
        return f"{'.'.join(path)} is gone"
    strange = STRANGE
    if torch.is_tensor(inner):
        strange += (inner.half(), inner.flatten()[:0], inner.long(), inner.to_sparse())
    place[key] = copy.deepcopy(choose.choice(strange))
    return f"{'.'.join(path)} = {place[key]!r:.60}"
