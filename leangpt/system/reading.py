"""Files that come from outside: ordinary ones only, JSON or one clear line why it is none."""

import contextlib
import json
import stat
import typing
from dataclasses import fields
from pathlib import Path

from leangpt.system.errors import RunError, UserError, refused

# in the text of torch's RuntimeError where the system refuses it a file
SIGNS_OF_REFUSAL = ("unable to open file", "closing file", "unable to mmap", "unable to stat")


def regular_file(path):
    """`path` as a Path, where an ordinary file is; the caller finds out itself where none is.

    Raises UserError for anything else: a pipe's reader waits for a writer, a device has no end.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # not there, or no name a file could have
        return path
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise UserError(f"{path} is a {kind}, not a file")
    return path


def file_with_an_end(path):
    """`path` as a Path, where a file or a pipe is, as in `--input <(zcat book.gz)`; UserError for a
    device, which may have no end. The caller finds out itself where nothing is."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return path
    if (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and path != Path("/dev/null"):
        raise UserError(f"{path} is a device, not a file")
    return path


def read_json(path):
    """A JSON object (dict) from a file, with a byte order mark or without; UserError where it is
    not one."""
    try:
        content = json.loads(regular_file(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


@contextlib.contextmanager
def parsing(path, otherwise="is damaged"):
    """Around whatever takes a stranger's file apart: what it trips over is one line about `path`.

    Values are checked by type where they are read; this is for what a parser of another's makes of
    a damaged file: any exception there is, and the panics of those written in Rust, which are
    no Exception.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C and the like
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} {otherwise} ({type(error).__name__}: {reason})") from None


@contextlib.contextmanager
def mapping(path):
    """Around torch's mapping of a file: what the system refuses it is a RunError, one line."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SIGNS_OF_REFUSAL):
            raise
        raise RunError(f"{path} cannot be read: {error}") from None


def check_fields(values, dataclass, where):
    """Raise UserError, beginning with `where`, for a value that the dataclass has no field for, or
    one of another type.

    values: a dict from a file. Types are plain: int, float, bool, str, dict, None, or one of
    several. An int does for a float, a bool for nothing but a bool.
    """
    unknown = sorted(set(values) - {field.name for field in fields(dataclass)}, key=str)
    if unknown:
        raise UserError(f"{where}: keys this model lacks: {unknown}")
    hints = typing.get_type_hints(dataclass)
    for name, value in values.items():
        kinds = typing.get_args(hints[name]) or (hints[name],)
        allowed = kinds + (int,) if float in kinds else kinds
        if bool not in kinds if isinstance(value, bool) else not isinstance(value, allowed):
            wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise UserError(f"{where}: {name} must be {wanted}, not {repr(value)[:50]}")
