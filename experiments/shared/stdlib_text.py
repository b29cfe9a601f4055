"""A text that every machine with Python has: the source of Python's standard library, as one file.

    python -m experiments.shared.stdlib_text
    python data/prepare_text.py --input=out/python_stdlib.txt --name=python_stdlib --tokenizer=gpt2

About 12 million characters, ten times tiny Shakespeare, without tests and installed packages. Files
follow one another in the order of their paths' hashes, so that the last tenth, which becomes the
validation split, is drawn from all over the library. Another Python version gives another text: the
version and the sha256 are printed.
"""

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from configurator import parse_config
from leangpt.system.errors import UserError, exit_cleanly

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


@dataclass
class Settings:
    out: str = "out/python_stdlib.txt"  # file to write


def stdlib_text(folder):
    """Every .py file under `folder`, joined -> str. Raises UserError where there are none."""
    names = [path.relative_to(folder) for path in Path(folder).rglob("*.py")]
    names = [name for name in names if not LEFT_OUT & set(name.parts)]
    if not names:
        raise UserError(f"no Python files under {folder}: this Python has no library source")
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    texts = []
    for name in names:
        try:
            texts.append((Path(folder) / name).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a few files are kept in other encodings on purpose
    return "\n\n".join(texts)


def main():
    settings, _ = parse_config(Settings)
    text = stdlib_text(sysconfig.get_paths()["stdlib"])
    out = Path(settings.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    digest = hashlib.sha256(text.encode()).hexdigest()
    print(
        f"{out}: {len(text):,} characters of CPython {platform.python_version()}'s library, "
        f"sha256 {digest}"
    )


if __name__ == "__main__":
    exit_cleanly(main)
