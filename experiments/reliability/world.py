"""A small world that cases start from: a text, data sets, runs, models in every kind of file."""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from experiments.reliability.more_files import make_more
from experiments.reliability.zygote import run
from leangpt.runs.checkpoint import load_checkpoint
from leangpt.text.folder import write_dataset

TINY = (
    "--dataset=tiny",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=4",
    "--gradient_accumulation_steps=1",
    "--warmup_iters=2",
    "--eval_iters=2",
    "--log_interval=1",
    "--device=cpu",
    "--learning_rate=1e-2",
)
DETERMINED = ("iter", "tokens", "loss", "train_loss", "val_loss", "lr", "grad_norm")
GREEDY = ("--temperature=0", "--num_samples=1", "--max_new_tokens=24", "--device=cpu")


class World:
    """Files under `folder`, made once; each case gets a copy of what it needs in a folder of its
    own, which is gone afterwards."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.pristine = self.folder / "pristine"
        if not (self.folder / "complete").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.pristine.mkdir(parents=True)
            make(self.pristine)
            (self.folder / "complete").touch()
        self._kept = {}  # results of commands on what is not damaged

    def case_folder(self, name, *needed) -> Path:
        """A new folder with copies of pristine files and folders."""
        folder = self.folder / "cases" / str(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for entry in needed:
            source = self.pristine / entry
            (folder / entry).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, folder / entry)
            else:
                shutil.copyfile(source, folder / entry)
        return folder

    def forget(self, folder):
        """Remove a case's folder and what its child said."""
        shutil.rmtree(folder, ignore_errors=True)
        for ending in ("out", "err"):
            folder.with_name(f"{folder.name}.{ending}").unlink(missing_ok=True)

    def once(self, key, make):
        """The result of `make()`, kept under `key` from the first time on."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def text(seed=7, sentences=400):
    """Sentences whose verb follows from their subject, so that there is something to learn."""
    choose = random.Random(seed)
    verbs = {"the king": "rules", "the fool": "laughs", "a ghost": "walks", "the queen": "waits"}
    places = ["at night", "in the hall", "by the sea", "alone"]
    subjects = [choose.choice(sorted(verbs)) for _ in range(sentences)]
    return "".join(f"{s} {verbs[s]} {choose.choice(places)}.\n" for s in subjects)


def make(folder: Path):
    """Write everything there is in a world. Raises RuntimeError where a script fails."""
    (folder / "book.txt").write_text(text())
    (folder / "other.txt").write_text(text(8, 500))
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in text().splitlines()[:60])
    )
    words = text()
    characters = "".join(sorted(set(words)))
    ids = [characters.index(character) for character in words]
    cut = len(ids) * 9 // 10
    meta = {"tokenizer": "char", "vocab_size": len(characters), "characters": characters}
    meta |= {"source": "a rule", "sha256": None}
    write_dataset(folder / "data" / "tiny", ids[:cut], ids[cut:], meta)
    nano = folder / "data" / "nano"  # nanoGPT's: no meta.json
    nano.mkdir()
    for split, part in (("train", ids[:cut]), ("val", ids[cut:])):
        np.array(part, dtype=np.uint16).tofile(nano / f"{split}.bin")
    shutil.copyfile(folder / "data" / "tiny" / "meta.pkl", nano / "meta.pkl")
    flags = [*TINY, "--max_iters=4", "--eval_interval=2"]
    must(run(["train.py", *flags, "--optimizer_variant=muonsn8"], folder))
    must(run(["train.py", *flags, "--out_dir=adam"], folder))
    nanogpt_checkpoint(folder / "adam" / "ckpt.pt", folder / "nanogpt")
    llama = [*flags, "--out_dir=wide", "--n_embd=64", "--n_layer=1"]
    must(run(["train.py", *llama], folder))
    must(
        run(
            ["sample.py", "--out_dir=wide", "--int4=True", "--save_int4=int4.safetensors", *GREEDY],
            folder,
        )
    )
    published(folder / "llama", gguf=folder / "llama.gguf")
    make_more(folder, flags)


def must(ended):
    if ended.status:
        raise RuntimeError(f"the world cannot be made: {ended.err}")


def nanogpt_checkpoint(source, folder):
    """A checkpoint with nanoGPT's keys alone."""
    checkpoint = load_checkpoint(source)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    folder.mkdir()
    torch.save(
        {
            "model": checkpoint["model"],
            "optimizer": None,
            "model_args": {name: checkpoint["model_args"][name] for name in names},
            "iter_num": checkpoint["iter_num"],
            "best_val_loss": torch.tensor(checkpoint["best_val_loss"]),
            "config": {"dataset": "tiny"},
        },
        folder / "ckpt.pt",
    )


# ---- a published model ---------------------------------------------------------------------------

WIDTH, INNER, HEADS, GROUPS, LAYERS = 64, 96, 4, 2, 2
PIECES = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(32, 122)), "th"]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def published(folder, gguf):
    """A random Llama as the hub has them, with tokenizer and chat format, and the same as GGUF."""
    folder.mkdir()
    config = dict(
        model_type="llama",
        vocab_size=len(PIECES),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    (folder / "config.json").write_text(json.dumps(config))
    tensors = llama_tensors()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated",
                          "invert": False},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_gguf(gguf, config, tensors)


def llama_tensors():
    generator = torch.Generator().manual_seed(0)
    head = WIDTH // HEADS
    layer = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (head * GROUPS, WIDTH),
        "self_attn.v_proj": (head * GROUPS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    shapes = {f"layers.{i}.{name}": s for i in range(LAYERS) for name, s in layer.items()}
    shapes |= {"embed_tokens": (len(PIECES), WIDTH), "norm": (WIDTH,)}
    shapes = {f"model.{name}.weight": shape for name, shape in shapes.items()}
    shapes |= {"lm_head.weight": (len(PIECES), WIDTH)}
    return {n: 0.3 * torch.randn(*shape, generator=generator) for n, shape in shapes.items()}


def write_gguf(path, config, tensors):
    """A GGUF file, rows of q and k in llama.cpp's order; none where the gguf package is missing."""
    try:
        import gguf
    except ImportError:
        return
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(PIECES)
    writer.add_token_merges(["t h"])
    writer.add_token_types([1] * len(PIECES))
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    theirs = {
        "embed_tokens": "token_embd", "norm": "output_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight").removeprefix("model.")
        if stem == "lm_head":
            new = "output"
        elif stem.startswith("layers."):
            _, number, rest = stem.split(".", 2)
            new = f"blk.{number}.{theirs[rest]}"
        else:
            new = theirs[stem]
        array = tensor.numpy()
        if "norm" not in new and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{new}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{new}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- what a run or a sample came to --------------------------------------------------------------


def run_result(out_dir):
    """What a run determines, of its folder: rows, weights, optimizer state, all as text or bytes.

    Raises UserError or OSError where a file of it is missing or damaged.
    """
    out_dir = Path(out_dir)
    with open(out_dir / "metrics.csv", newline="") as file:
        rows = [tuple(row[name] for name in DETERMINED) for row in csv.DictReader(file)]
    names = [name for name in ("ckpt_last.pt", "ckpt.pt") if (out_dir / name).exists()]
    found = [(name, *plain(load_checkpoint(out_dir / name))) for name in names]
    return rows, found


def plain(checkpoint):
    """A checkpoint as nested tuples that compare by value, without clocks and the rates of the last
    step, which every step sets anew."""
    kept = {name: checkpoint.get(name) for name in ("model", "optimizer", "iter_num", "model_args")}
    return flat(kept)


def flat(value):
    if torch.is_tensor(value):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.contiguous().view(-1).tolist().__repr__(),
        )
    if isinstance(value, dict):
        pairs = sorted(value.items(), key=lambda pair: str(pair[0]))
        return tuple((str(key), flat(item)) for key, item in pairs if key != "lr")
    if isinstance(value, list | tuple):
        return tuple(map(flat, value))
    return repr(value)


def said(out):
    """Lines of stdout that do not tell the time."""
    clocks = ("tokens/s", "eta", "done:", "evaluated in", " s)", "rounded to", "commit")
    return [line for line in out.splitlines() if not any(word in line for word in clocks)]


def leftovers(folder):
    """Temporary files and locks below a folder."""
    found = [p for p in Path(folder).rglob("*") if p.name.endswith("tmp") or p.name == ".lock"]
    return sorted(str(path.relative_to(folder)) for path in found)
