"""Source code as GPT-2 tokens: more than 500M of them, from pinned Debian packages.

    python data/source_code/prepare.py                      # everything: a quarter of an hour
    python data/source_code/prepare.py --tokens=55000000    # the first 55M training tokens only
    python data/source_code/prepare.py --stage=text         # only text/part-*.tar.xz, to carry
    python data/source_code/prepare.py --stage=tokens       # only from there to train.bin, val.bin

The kernel, compilers, libraries and tools of Debian 12, in C, C++, Java, Go, Rust, Pascal, Lisp,
Erlang and others, and the documentation beside them. Generated files, tables, exact copies and
near-copies are dropped (selection.py, copies.py); files come in the order of a hash of their path.
The first 10M tokens are the validation set, none of whose files has a near-copy in training; it
is the same whatever `tokens` is. Part 1 of the archives holds it and the training tokens that
follow, so that one file is enough for short runs on a machine without a network.

Memory stays below 1 GB. Kill it at any moment and run it again: finished packages, parts and
tokens are kept, and the result has the same bytes.
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import parse_config  # noqa: E402
from data.source_code.archives import make_archives, part_number  # noqa: E402
from data.source_code.packages import PACKAGES  # noqa: E402
from data.source_code.token_files import make_token_files  # noqa: E402
from leangpt.system.errors import UserError, exit_cleanly, refused  # noqa: E402


@dataclass
class Settings:
    """Prepare source code from Debian packages with GPT-2's tokenizer."""

    stage: str = "all"  # text: packages to archives; tokens: archives to token files; all: both
    packages: str | None = None  # a folder of the pinned .deb files; None: they come through apt
    tokens: int | None = None  # training tokens to write; None: all there are
    val_tokens: int = 10_000_000  # of the validation set
    part_mb: float = 170.0  # text in an archive, in 10^6 bytes: about a fourth of that packed
    workers: int | None = None  # processes; None: as many as cores
    out_dir: str = str(Path(__file__).resolve().parent)  # the dataset's folder

    def __post_init__(self):
        if self.stage not in ("all", "text", "tokens"):
            raise UserError(f"--stage={self.stage}: choose text, tokens or all")
        for name in ("tokens", "val_tokens", "part_mb", "workers"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} must be positive, not {value}")
        if self.packages is not None and not os.path.isdir(self.packages):
            raise UserError(f"--packages={self.packages} is not a folder")

    @property
    def processes(self):
        """How many to use."""
        own = getattr(os, "sched_getaffinity", None)  # Linux's alone
        return self.workers or (len(own(0)) if own else os.cpu_count() or 1)


def main(argv=None, packages=PACKAGES):
    settings, _ = parse_config(Settings, argv)
    signal.signal(signal.SIGTERM, stop)
    folder = Path(settings.out_dir)
    try:
        if settings.stage == "tokens":
            parts = sorted(folder.glob("text/part-*.tar.xz"), key=part_number)
            if not parts:
                raise UserError(f"no archives in {folder / 'text'}: make them with --stage=text")
        else:
            parts = make_archives(packages, folder, settings)
        if settings.stage != "text":
            make_token_files(parts, folder, settings)
    except OSError as error:  # disk full, folder not writable
        raise refused(f"run it again to go on from {folder}", error) from error


def stop(number, frame):
    """On SIGTERM: end in order, its processes too."""
    print("stopped by SIGTERM; run it again to go on from there", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    exit_cleanly(main)
