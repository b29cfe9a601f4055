"""Files from outside: ordinary, JSON objects, fields of the types they should have."""

import os
from dataclasses import dataclass

import pytest

from leangpt.system.errors import RunError, UserError
from leangpt.system.reading import check_fields, mapping, read_json, regular_file


def test_regular_files_and_what_is_none(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("a", "link", "nowhere", "n" * 300):
        assert regular_file(tmp_path / name) == tmp_path / name
    assert str(regular_file("a\0b")) == "a\0b"
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("pipe", "pipe"), (".", "folder"), ("/dev/null", "device")):
        with pytest.raises(UserError, match=f"{kind}.*, not a file"):
            regular_file(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[1]", b"3", b"null", b"[" * 10**5, b"9" * 10**5]
)
def test_json_that_is_no_object(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="a.json (cannot be read as JSON|must hold a JSON object)"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


@dataclass
class Fields:
    count: int = 1
    rate: float | None = None
    on: bool = False
    name: str = ""


def test_fields_have_their_types():
    check_fields(dict(count=3, rate=2, on=True, name="a"), Fields, "here")
    check_fields(dict(rate=None), Fields, "here")
    for values, words in (
        (dict(count=3.0), "here: count must be int, not 3.0"),
        (dict(count=True), "count must be int, not True"),
        (dict(rate=True), "rate must be float or None, not True"),
        (dict(rate="2"), "rate must be float or None, not '2'"),
        (dict(on=1), "on must be bool, not 1"),
        (dict(name=None), "name must be str, not None"),
        ({"other": 1, 3: 2}, "here: keys this model lacks: "),
    ):
        with pytest.raises(UserError, match=words):
            check_fields(values, Fields, "here")


@pytest.mark.parametrize("what", ["unable to open file", "Error closing file", "unable to mmap 8"])
def test_what_the_system_refuses_torch_is_one_line(what):
    with pytest.raises(RunError, match="w.safetensors cannot be read: .*Input/output error"):
        with mapping("w.safetensors"):
            raise RuntimeError(f"{what} <w.safetensors>: Input/output error (5)")
    with pytest.raises(RuntimeError, match="another"):
        with mapping("w.safetensors"):
            raise RuntimeError("another one")
