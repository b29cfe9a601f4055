"""What the training tests share: a text made by a rule, a model of a few thousand weights."""

import csv
import random
import subprocess
import sys
from pathlib import Path

from leangpt.text.folder import write_dataset

ROOT = Path(__file__).resolve().parent.parent
SHAPE = [
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
]
DETERMINED = ("iter", "tokens", "loss", "train_loss", "val_loss", "lr", "grad_norm")


def make_dataset(data_dir):
    """Write data_dir/tiny: sentences whose verb follows from their subject, so there is something
    to learn; the same on every machine."""
    choose = random.Random(7)
    verbs = {"the king": "rules", "the fool": "laughs", "a ghost": "walks", "the queen": "waits"}
    places = ["at night", "in the hall", "by the sea", "alone"]
    sentences = []
    for _ in range(400):
        subject = choose.choice(sorted(verbs))
        sentences.append(f"{subject} {verbs[subject]} {choose.choice(places)}.\n")
    text = "".join(sentences)
    characters = "".join(sorted(set(text)))
    ids = [characters.index(character) for character in text]
    cut = len(ids) * 9 // 10
    write_dataset(
        Path(data_dir) / "tiny",
        ids[:cut],
        ids[cut:],
        {
            "tokenizer": "char",
            "vocab_size": len(characters),
            "characters": characters,
            "source": "a rule",
            "sha256": None,
        },
    )


def arguments(tmp_path, name, *more):
    """Flags of a run that writes tmp_path/name; the data set is made at the first call."""
    data_dir = tmp_path / "data"
    if not data_dir.exists():
        make_dataset(data_dir)
    return [*SHAPE, f"--data_dir={data_dir}", f"--out_dir={tmp_path / name}", *more]


def run_script(*command, **options):
    """Run a Python script of the repository -> CompletedProcess, output as text."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, **options
    )


def determined(out_dir):
    """The rows of metrics.csv, as text, without the columns that clocks and meters fill."""
    with open(Path(out_dir) / "metrics.csv", newline="") as file:
        return [[row[name] for name in DETERMINED] for row in csv.DictReader(file)]
