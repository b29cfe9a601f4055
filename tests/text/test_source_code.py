"""data/source_code: packages read as they are, copies dropped, the same bytes however it ran.

The packages here are made by the tests: real .deb files (an `ar` archive around tar files), small.
"""

import gzip
import hashlib
import io
import json
import os
import random
import tarfile
import zipfile

import numpy as np
import pytest

from data.source_code import archives, copies, prepare, token_files
from data.source_code.packages import PACKAGES, Package, fetch, files_of
from data.source_code.selection import refusal, wanted
from leangpt.system.errors import UserError
from leangpt.text import sources
from leangpt.text.dataset import load_dataset

END = 50256  # <|endoftext|>
WORDS = "alpha beta gamma delta count index buffer length state queue".split()


@pytest.fixture(scope="module")
def gpt2():
    try:
        return sources.gpt2_encoding()
    except UserError as error:
        pytest.skip(str(error))


def source(seed, lines=40):
    """A file of so many lines that no other seed's file has."""
    choose = random.Random(seed)
    return "".join(
        f"    {choose.choice(WORDS)}_{seed} = {choose.choice(WORDS)} "
        f"({choose.choice(WORDS)}, {line});\n"
        for line in range(lines)
    )


def tar_of(files, mode):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
        link = tarfile.TarInfo("link.c")
        link.type, link.linkname = tarfile.SYMTYPE, "a.c"
        tar.addfile(link)
    return content.getvalue()


def deb_of(folder, name, files, archive=""):
    """Write NAME_1_all.deb that holds `files` (name -> bytes) -> its Package."""
    data, content = tar_of(files, "w:xz"), b"!<arch>\n"
    for member, body in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", data),
    ):
        content += f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode()
        content += body + b"\n" * (len(body) % 2)
    package = Package(name, "1", hashlib.sha256(content).hexdigest(), archive)
    (folder / package.file_name).write_bytes(content)
    return package


# ---- packages -----------------------------------------------------------------------------------


def test_files_of_plain_packages_and_of_archives_in_them(tmp_path):
    files = {
        "./usr/a.c": b"int a;\n",
        "./usr/b.el.gz": gzip.compress(b"(b)\n"),
        "./usr/big.c": b"x" * (1 << 20) + b"y",
        "./usr/test.tar": b"not one",
    }
    plain = deb_of(tmp_path, "plain", files)
    found = {path: read() for path, read in files_of(tmp_path / plain.file_name)}
    assert found == {"usr/a.c": b"int a;\n", "usr/b.el": b"(b)\n", "usr/test.tar": b"not one"}

    nested = deb_of(
        tmp_path,
        "nested",
        {
            "./usr/src/other.tar.xz": b"broken",
            "./usr/src/x-1.tar.xz": tar_of({"x-1/a.c": b"1", "x-1/t.tar.xz": b"2"}, "w:xz"),
        },
    )
    found = {path: read() for path, read in files_of(tmp_path / nested.file_name, "x-1.tar.xz")}
    assert found == {"x-1/a.c": b"1", "x-1/t.tar.xz": b"2"}

    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("java/A.java", "class A {}")
    java = deb_of(tmp_path, "java", {"./usr/lib/src.zip": zipped.getvalue()})
    found = {path: read() for path, read in files_of(tmp_path / java.file_name, "lib/src.zip")}
    assert found == {"java/A.java": b"class A {}"}

    with pytest.raises(UserError, match="can be read: it has no y.tar.xz"):
        list(files_of(tmp_path / nested.file_name, "y.tar.xz"))
    (tmp_path / "text.deb").write_text("no package")
    with pytest.raises(UserError, match="text.deb is not a Debian package"):
        list(files_of(tmp_path / "text.deb"))


def test_only_the_pinned_files_are_taken(tmp_path, monkeypatch):
    package = deb_of(tmp_path, "tools", {"./a.c": b""})
    assert fetch(package, tmp_path / "cache", tmp_path) == tmp_path / package.file_name
    other = Package("tools", "1", "0" * 64)
    with pytest.raises(UserError, match="is not the file that is pinned"):
        fetch(other, tmp_path / "cache", tmp_path)
    with pytest.raises(UserError, match="has no more_2_all.deb"):
        fetch(Package("more", "2", ""), tmp_path / "cache", tmp_path)

    programs = tmp_path / "bin"
    programs.mkdir()
    apt = programs / "apt-get"
    apt.write_text(
        f"#!/bin/sh\n[ $3 = tools=1 ] && cp {tmp_path}/*.deb . || "
        "{ echo E: Version not found >&2; exit 100; }\n"
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    path = fetch(package, tmp_path / "cache")
    assert path.read_bytes() == (tmp_path / package.file_name).read_bytes()
    apt.unlink()
    assert fetch(package, tmp_path / "cache") == path  # not fetched again
    apt.write_text("#!/bin/sh\necho E: Version not found >&2; exit 100\n")
    apt.chmod(0o755)
    with pytest.raises(UserError, match="Version not found.*snapshot archive.*--packages=FOLDER"):
        fetch(Package("more", "1:2", ""), tmp_path / "cache")


def test_pins_are_complete():
    assert len({package.name for package in PACKAGES}) == len(PACKAGES) > 10
    assert all(len(package.sha256) == 64 for package in PACKAGES)
    assert Package("emacs-el", "1:28", "").file_name == "emacs-el_1%3a28_all.deb"


# ---- selection ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, expected",
    [
        ("linux/kernel/fork.c", True),
        ("x/Kconfig", True),
        ("x/a.rst", True),
        ("x/a.json", False),
        ("x/.c", False),
        ("drivers/gpu/include/asic_reg/a.h", False),
        ("x/ChangeLog", False),
    ],
)
def test_wanted(path, expected):
    assert wanted(path) == expected


@pytest.mark.parametrize(
    "text, reason",
    [
        (source(1), None),
        ("a;\n" * 5, "short"),
        ("\n\n".join("ab;" * 9), None),
        ("/* Generated by genreg.py. */\n" + source(1), "generated"),
        ("# DO NOT EDIT\n" + source(1), "generated"),
        (source(1) + "x" * 1001, "long lines"),
        (source(1) + "long " * 190 * 2, "long lines"),
        ("    { 0x12, 0x3456, 0x789a },\n" * 40, "table"),
        ("".join(f"#define REG_NAME_OF_{i} 0x{i:04x}\n" for i in range(40)), "table"),
        (source(1) + "\0", "not text"),
    ],
)
def test_refusal(text, reason):
    assert refusal(text.encode()) == reason


def test_text_that_is_not_utf8_is_refused():
    assert refusal(source(1).encode() + b"\xe9") == "not UTF-8"
    assert refusal((source(1) + "é").encode()) is None


# ---- copies -------------------------------------------------------------------------------------


def test_shingles_see_neither_indentation_nor_a_licence():
    text = source(1).encode()
    licence = b"/* Copyright 2020\n * of someone\n * and others */\n\n"
    plain = copies.shingles(text)
    assert len(plain) == 38
    assert (copies.shingles(licence + text.replace(b"    ", b"\t")) == plain).all()
    comment = b"/* What this\n * file is\n * for */\n"
    assert len(copies.shingles(comment + text)) == 41
    assert len(copies.shingles(b"a\nb\n")) == 0


def test_seen_counts_what_was_kept():
    seen, one, two = copies.Seen(bits=20), *(copies.shingles(source(i).encode()) for i in (1, 2))
    assert seen.share(one) == 0
    seen.add(one)
    assert seen.share(one) == 1 and seen.share(two) < 0.1
    assert seen.share(np.concatenate([one, two])) == pytest.approx(0.5, abs=0.05)


def test_near_goes_by_the_smaller_file():
    validation = [copies.shingles(source(i).encode()) for i in (1, 2, 3)]
    index = copies.Validation(validation)
    lines = source(2).splitlines(keepends=True)
    far = copies.shingles(("".join(lines[:8]) + source(9)).encode())
    near = copies.shingles(("".join(lines[:20]) + source(9)).encode())
    within = copies.shingles((source(8, 4000) + source(2)).encode())
    assert not index.near(far) and index.near(near) and index.near(within)
    assert not index.near(copies.shingles(source(9).encode()))


# ---- the whole ----------------------------------------------------------------------------------


SHARED = ["x-1/same.c"]  # in both packages


@pytest.fixture
def corpus(tmp_path):
    """Two packages with 60 files of their own and one that both have -> (packages, texts)."""
    texts = {f"x-1/f{i}.c": source(i) for i in range(60)}
    texts[SHARED[0]] = source(100)
    one = {f"./{name}": text.encode() for name, text in texts.items() if name[5] in "0123"}
    two = {f"./{name}": text.encode() for name, text in texts.items() if name[5] not in "0123"}
    one[f"./{SHARED[0]}"] = texts[SHARED[0]].encode()
    one["./x-1/made.c"] = b"/* generated by make.py */\n" + source(200).encode()
    packages = [
        deb_of(tmp_path, "one", one),
        deb_of(tmp_path, "two", {"./two.tar.xz": tar_of(two, "w:xz")}, "two.tar.xz"),
    ]
    return packages, texts


def run(tmp_path, packages, name, *flags):
    """prepare.py with these packages into tmp_path/name -> that folder."""
    prepare.main(
        [
            f"--packages={tmp_path}",
            f"--out_dir={tmp_path / name}",
            "--val_tokens=2000",
            "--part_mb=0.04",
            "--workers=1",
            *flags,
        ],
        packages,
    )
    return tmp_path / name


def documents(tokens, gpt2):
    """The texts that end-of-text tokens end."""
    text = gpt2.decode(tokens.tolist())
    return [part for part in text.split("<|endoftext|>") if part]


@pytest.mark.slow
def test_a_dataset_of_every_file_once(tmp_path, corpus, gpt2, capsys):
    packages, texts = corpus
    folder = run(tmp_path, packages, "out")
    dataset = load_dataset("out", tmp_path)
    train = documents(dataset.train, gpt2)
    validation = documents(dataset.val, gpt2)
    assert len(dataset.val) == 2000 and len(train) + len(validation) == len(texts) == 61
    places = [(f"one/{name}", name) for name in texts if name in SHARED or name[5] in "0123"]
    places += [(f"two/{name}", name) for name in texts if name[5] not in "0123"]
    ordered = sorted(places, key=lambda place: archives.key_of(place[0]))
    expected = list(dict.fromkeys(texts[name] for _, name in ordered))  # the first of each
    cut = len(validation)
    assert validation[:-1] == expected[: cut - 1] and train == expected[cut:]
    assert expected[cut - 1].startswith(validation[-1])  # 2,000 tokens to the token
    parts = sorted(path.name for path in (folder / "text").glob("part*"))
    assert len(parts) >= 3 and parts[0] == f"part-1-of-{len(parts)}.tar.xz"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["sha256"] == hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()
    out = capsys.readouterr().out
    assert "1 exact copies" in out and "1 generated" in out and "wrote " in out
    run(tmp_path, packages, "out")
    assert "is prepared already" in capsys.readouterr().out


@pytest.mark.slow
def test_copies_and_what_is_near_validation_are_dropped(tmp_path, gpt2):
    texts = {f"f{i}.c": source(i) for i in range(60)}
    keyed = sorted(texts, key=lambda name: archives.key_of(f"one/{name}"))
    first, late = texts[keyed[0]].splitlines(keepends=True), texts[keyed[-1]]
    more = {
        "exact": texts[keyed[30]],
        "near_copy": late.replace("count", "number", 3),
        "near_val": "".join(first[:18]) + source(300, 24),
        "far_val": "".join(first[:8]) + source(301, 34),
    }
    for what, text in more.items():  # names that come after those they are copies of
        name = next(
            name
            for name in (f"{what}{i}.c" for i in range(10000))
            if archives.key_of(f"one/{name}") > archives.key_of(f"one/{keyed[-1]}")
        )
        texts[name] = text
    package = deb_of(tmp_path, "one", {f"./{name}": text.encode() for name, text in texts.items()})
    run(tmp_path, [package], "out")
    train = documents(load_dataset("out", tmp_path).train, gpt2)
    assert more["far_val"] in train and late in train
    assert more["near_val"] not in train and more["near_copy"] not in train
    assert train.count(more["exact"]) == 1


@pytest.mark.slow
def test_neither_processes_nor_interruptions_nor_stages_change_a_byte(
    tmp_path, corpus, gpt2, monkeypatch
):
    packages, _ = corpus
    wanted = run(tmp_path, packages, "whole", "--workers=2")

    collect = archives.collect

    def only_one(package, *rest):
        if package.name == "two":
            raise KeyboardInterrupt
        collect(package, *rest)

    append, calls = token_files._append, []

    def only_twice(path, *rest):
        calls.append(path)
        append(path, *rest)
        if len(calls) == 2:
            raise KeyboardInterrupt  # its tokens are written, but not recorded

    with monkeypatch.context() as patch:
        patch.setattr(archives, "collect", only_one)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, packages, "cut", "--stage=text")
    run(tmp_path, packages, "cut", "--stage=text")
    assert not (tmp_path / "cut" / "train.bin").exists()
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "_append", only_twice)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, packages, "cut", "--stage=tokens")
    assert not (tmp_path / "cut" / "meta.json").exists()
    folder = run(tmp_path, packages, "cut", "--stage=tokens")
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (folder / name).read_bytes() == (wanted / name).read_bytes(), name
    assert not list(folder.glob("*.part")) and not (folder / "progress.json").exists()

    meta = json.loads((folder / "meta.json").read_text())  # killed between its last two writes
    (folder / "meta.json").unlink()
    count = len(list(folder.glob("text/part*")))
    (folder / "progress.json").write_text(
        json.dumps(
            {
                "identity": meta["made_of"],
                "parts": count,
                "val": meta["val_tokens"],
                "train": meta["train_tokens"],
            }
        )
    )
    run(tmp_path, packages, "cut", "--stage=tokens")
    assert (folder / "train.bin").read_bytes() == (wanted / "train.bin").read_bytes()


@pytest.mark.slow
def test_fewer_tokens_are_the_beginning_and_need_fewer_archives(tmp_path, corpus, gpt2):
    packages, _ = corpus
    folder = run(tmp_path, packages, "out")
    train, val = ((folder / name).read_bytes() for name in ("train.bin", "val.bin"))
    for path in folder.glob("text/part*"):
        if not path.name.startswith("part-1-"):
            path.unlink()
    with pytest.raises(UserError, match="all training tokens are wanted; the 1 of"):
        run(tmp_path, packages, "out", "--stage=tokens", "--val_tokens=1999")
    run(tmp_path, packages, "out", "--stage=tokens", "--tokens=5000")
    assert (folder / "train.bin").read_bytes() == train[:10000] != train
    assert (folder / "val.bin").read_bytes() == val
    with pytest.raises(UserError, match="5,000,000 training tokens are wanted"):
        run(tmp_path, packages, "out", "--stage=tokens", "--tokens=5000000")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stage=both"], "--stage=both: choose text, tokens or all"),
        (["--tokens=0"], "tokens must be positive"),
        (["--packages=nowhere"], "is not a folder"),
        (["--stage=tokens"], "no archives in .*text: make them with --stage=text"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        prepare.main([f"--out_dir={tmp_path / 'out'}", *flags])


def test_too_little_text_and_other_settings_are_said(tmp_path, corpus, gpt2):
    packages, _ = corpus
    with pytest.raises(UserError, match="too few for val_tokens=5000000"):
        run(tmp_path, packages, "few", "--val_tokens=5000000")
    run(tmp_path, packages, "out", "--stage=text")
    with pytest.raises(UserError, match="was made with other settings: delete it"):
        run(tmp_path, packages, "out", "--stage=text", "--val_tokens=3000")
