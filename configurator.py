"""One typed, validated configuration out of defaults, config files and --key=value flags.

    python train.py config/train_shakespeare_char.py --n_layer=6 --compile=0

A script declares its settings once, as a dataclass whose fields all have a default and, after it,
a comment that says what the field is for (the comment is the help text, unless the field's metadata
has a "help"):

    @dataclass
    class Settings:
        n_layer: int = 12           # transformer blocks
        k_chunk: int | None = None  # key/value tile, rows; None: chosen from the shape

    config, given = parse_config(Settings)

Arguments are applied from left to right. A config file is plain Python: it runs alone, in a
namespace of its own, and every global it leaves behind is a setting, except names that start
with `_`, modules, functions and classes. Anything unknown or ill-typed is a UserError.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import os
import runpy
import sys
import textwrap
import tokenize
import types
import typing
from pathlib import Path

from leangpt.system.errors import UserError

TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def parse_config(settings, argv=None):
    """Build the settings dataclass from `argv` (default: this process's arguments).

    Returns (config, given): `config` is an instance of `settings`; `given` maps each key that a
    config file or a flag set to its value, in the order in which they were first set.
    Accepted: CONFIG.py, --key=value, --key value, and a bare --key for a bool (meaning True).
    Dashes inside a key are underscores. `--help` prints every key and exits with status 0.
    Where the metadata of a tuple[str, ...] field says "positional", words that are no flags are
    gathered there, and there are no config files.
    Raises UserError on an unknown key, a value of the wrong type, or an unreadable config file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(settings))
        sys.exit(0)
    kinds, positional = _field_types(settings), _positional(settings)
    given, words = {}, argv
    while words:
        word, words = words[0], words[1:]
        if positional and not word.startswith("-"):
            given[positional] = (*given.get(positional, ()), word)
            continue
        if not word.startswith("-"):
            given.update(_read_config_file(word, kinds))
            continue
        name, equals, text = word.partition("=")
        key = name[2:].replace("-", "_")
        if not name.startswith("--") or key not in kinds:
            raise UserError(_unknown([name], kinds, "on the command line"))
        if not equals:
            text, words = _value_after(name, kinds[key], words)
        given[key] = _from_text(key, kinds[key], text)
    return settings(**given), given


def config_dict(config):
    """The settings as a plain dict that json can write (tuples become lists)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}


def describe_changes(config):
    """One line, `key=value (default)` for each setting that differs from its default."""
    default = type(config)()
    changes = [
        f"{key}={value} ({getattr(default, key)})"
        for key, value in vars(config).items()
        if value != getattr(default, key)
    ]
    return ", ".join(changes) if changes else "all settings at their defaults"


def help_text(settings):
    """What the script is for, in its own words, then every key with its type, default and comment,
    under the headings of the source."""
    comments, headings = _read_comments(settings)
    script = Path(sys.argv[0]).name or "script.py"
    positional = _positional(settings)
    words = f"{positional.upper()} ..." if positional else "[CONFIG.py ...]"
    lines = [f"usage: python {script} {words} [--key=value ...]"]
    purpose = settings.__doc__
    if not purpose or purpose.startswith(f"{settings.__name__}("):  # dataclass's own
        purpose = sys.modules[settings.__module__].__doc__
    if purpose:
        lines += ["", inspect.cleandoc(purpose)]
    kinds = _field_types(settings)
    if not any(headings.values()):
        lines.append("")
    for field in dataclasses.fields(settings):
        if headings.get(field.name):
            lines += ["", headings[field.name]]
        left = f"  --{field.name}: {_type_name(kinds[field.name])} = {_default(field)!r}"
        comment = field.metadata.get("help", comments.get(field.name, ""))
        separator = "  " if len(left) <= 42 else "\n" + " " * 44
        lines.append(f"{left:<42}{separator}{comment}".rstrip())
    return "\n".join(lines)


# ---- the command line ---------------------------------------------------------------------------


def _value_after(name, kind, words):
    """The value of a flag written without `=`: the next word, or True for a bool."""
    following = words[0] if words else None
    if bool in _alternatives(kind):
        if following is not None and following.lower() in TRUE | FALSE:
            return following, words[1:]
        return "True", words
    if following is None or following.startswith("--"):
        raise UserError(f"{name} needs a value ({_type_name(kind)}): write {name}=VALUE")
    return following, words[1:]


def _from_text(key, kind, text):
    """Read the text of a flag as the field's type."""
    for option in _alternatives(kind):
        if option is type(None):
            if text.lower() in ("none", "null"):
                return None
            continue
        try:
            return _convert(option, text)
        except ValueError:
            continue
    raise UserError(f"--{key}={text}: expected {_type_name(kind)}")


def _convert(option, text):
    """`text` as one plain type; ValueError where it is not one."""
    if option is bool:
        if text.lower() not in TRUE | FALSE:
            raise ValueError(text)
        return text.lower() in TRUE
    if typing.get_origin(option) is tuple:
        return tuple(
            _convert(typing.get_args(option)[0], part.strip())
            for part in text.split(",")
            if part.strip()
        )
    value = option(text)
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(text)
    return value


# ---- config files -------------------------------------------------------------------------------


def _read_config_file(path, kinds):
    """Run a config file in a fresh namespace; return the settings it leaves behind, checked."""
    if not os.path.isfile(path):
        key = path.partition("=")[0].replace("-", "_")
        hint = f"did you mean --{path}?" if key in kinds else "settings are written --key=value"
        raise UserError(f"no config file {path!r}: {hint}")
    try:
        namespace = runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # the file is the user's own code: its errors are the user's
        line = _line_in(path, error)
        message = f"{path}{line}: {type(error).__name__}: {error}"
        raise UserError(message) from error
    ignored = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    values = {
        key: value
        for key, value in namespace.items()
        if not key.startswith("_") and not isinstance(value, ignored)
    }
    unknown = [key for key in values if key not in kinds]
    if unknown:
        raise UserError(_unknown(unknown, kinds, f"in {path}"))
    return {key: _checked(key, kinds[key], value, path) for key, value in values.items()}


def _line_in(path, error):
    """`, line N` of the last frame of `error` that lies in the file `path`."""
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return line


def _checked(key, kind, value, path):
    """A Python value from a config file, if it has the field's type."""
    for option in _alternatives(kind):
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            if isinstance(value, (tuple, list)) and all(type(part) is item for part in value):
                return tuple(value)
        elif option is float and type(value) in (int, float):
            return float(value)
        elif type(value) is option:
            return value
    raise UserError(f"{path}: {key} = {value!r}: expected {_type_name(kind)}")


# ---- fields, their types and their comments -----------------------------------------------------


def _field_types(settings):
    hints = typing.get_type_hints(settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}


def _positional(settings):
    """Name of the field that gathers the words that are no flags, or None."""
    names = (f.name for f in dataclasses.fields(settings) if f.metadata.get("positional"))
    return next(names, None)


def _alternatives(kind):
    """The plain types of `int | None` and the like. None first: 'none' is never a str there."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return sorted(typing.get_args(kind), key=lambda option: option is not type(None))
    return [kind]


def _type_name(kind):
    names = []
    for option in _alternatives(kind):
        if typing.get_origin(option) is tuple:
            names.append(f"{typing.get_args(option)[0].__name__},...")
        elif option is not type(None):
            names.append(option.__name__)
    if type(None) in _alternatives(kind):
        names.append("None")
    return " | ".join(names)


def _default(field):
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory()


def _unknown(keys, kinds, where):
    """An error message that names each unknown key and the nearest key that exists."""
    described = []
    for key in keys:
        near = difflib.get_close_matches(key.lstrip("-").replace("-", "_"), kinds, 1, 0.6)
        described.append(f"{key} (did you mean {near[0]}?)" if near else key)
    word = "unknown setting" if len(keys) == 1 else "unknown settings"
    return f"{word} {where}: {', '.join(described)}; --help lists every setting"


def _read_comments(settings):
    """From the source: {field: its trailing comment}, {field: the comment lines above it}."""
    trailing, above = {}, {}
    for base in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # a class typed into a shell has no source: no comments
            continue
        comments = {}  # line number -> (stands alone on its line, text)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                alone = token.line.lstrip().startswith("#")
                comments[token.start[0]] = (alone, token.string.lstrip("#").strip())
        for node in ast.parse(source).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            alone, text = comments.get(node.end_lineno, (True, ""))
            trailing[node.target.id] = "" if alone else text
            heading, line = [], node.lineno - 1
            while comments.get(line, (False, ""))[0]:
                heading.insert(0, comments[line][1])
                line -= 1
            above[node.target.id] = "\n".join(heading)
    return trailing, above
