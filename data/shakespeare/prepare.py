"""Shakespeare in GPT-2's byte-pair encoding: writes train.bin, val.bin and meta.json here.

    python data/shakespeare/prepare.py [--input FILE]

The same text and split as shakespeare_char, for fine-tuning GPT-2 checkpoints.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.prepare_text import shakespeare_script  # noqa: E402
from leangpt.system.errors import exit_cleanly  # noqa: E402

if __name__ == "__main__":
    exit_cleanly(lambda: shakespeare_script(__file__, "gpt2"))
