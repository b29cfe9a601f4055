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
import contextlib
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

from leangpt.system.errors import UserError, named_as_typed

TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
LARGEST = 2**63 - 1  # what 64 bits hold
HOW_TO_WRITE = "settings are written --key=value, and a value with spaces needs quotes"


def parse_config(settings, argv=None, config_files=True):
    """Build the settings dataclass from `argv` (default: this process's arguments).

    Returns (config, given): `config` is an instance of `settings`; `given`, a Given, maps each key
    that a config file or a flag set to its value, in the order in which they were first set.
    Accepted, in any order: CONFIG.py, --key=value, --key value, a bare --key for a bool (meaning
    True), and lists as --key=1,2 or --key 1 2, up to the next flag or CONFIG.py. Dashes inside a
    key are underscores; the metadata of a field may give it a second name, "alias", and a reason
    why it has one value only, its default: "fixed", for names that people bring from elsewhere.
    `--help` prints every key and exits with status 0. Where the metadata of a tuple[str, ...] field
    says "positional", words that are no flags are gathered there, and there are no config files;
    with config_files=False such words are refused, and so is a key with two values.
    Raises UserError on an unknown key, a value of the wrong type, another value of a fixed field, a
    number that 64 bits do not hold, or an unreadable config file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(settings, config_files))
        sys.exit(0)
    kinds, names = _field_types(settings), _names(settings)
    positional = _positional(settings)
    given, flags, after = Given(), {}, ""
    for flag, key, text in read_words(settings, argv):
        if key is not None:
            after = f" after {flag}"
            given.typed[key] = flag[2:].replace("-", "_")
            value = _from_text(flag, kinds[key], text)
            flags[key] = (flag, value)
            if not config_files and given.get(key, value) != value:
                raise UserError(f"{flag} is given twice: it takes one value")
            given[key] = value
        elif positional:
            given[positional] = (*given.get(positional, ()), text)
        elif config_files:
            values, typed = _read_config_file(text, kinds, names)
            _say_overruled(text, values, flags)
            given.update(values)
            given.typed.update(typed)
        else:
            raise UserError(f"unexpected {_short(text)!r}{after}: {HOW_TO_WRITE}")
    _check_values(settings, given)
    with named_as_typed(given.typed):
        return settings(**given), given


def _say_overruled(path, values, flags):
    """A note on stderr of each flag {key: (flag, value)} that a config file after it sets anew."""
    for key in [key for key in flags if key in values]:
        flag, value = flags.pop(key)
        if values[key] != value and os.environ.get("RANK", "0") == "0":  # once, under torchrun
            note = f"note: {path} comes after {flag}={value} and sets {values[key]}: "
            print(note + "flags after the file have the last word", file=sys.stderr)


class Given(dict):
    """{key: value} of what was set; `typed` has {key: the name that it was set by}."""

    def __init__(self):
        self.typed = {}


def read_words(settings, argv=None):
    """(flag, its key, text of its value) of each flag of a command line, (None, None, word) of
    every other word.

    For who asks what was written, and not only what it means. Raises UserError as parse_config.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    kinds, names = _field_types(settings), _names(settings)
    while words:
        word, words = words[0], words[1:]
        if not word.startswith("-"):
            yield None, None, word
            continue
        flag, equals, text = word.partition("=")
        key = names.get(flag[2:].replace("-", "_"))
        if not flag.startswith("--") or key is None:
            raise UserError(_unknown([flag], names, "on the command line"))
        if not equals:
            text, words = _value_after(flag, kinds[key], words)
        if _is_list(kinds[key]):
            count = _length_of_list(words)
            text, words = ",".join([text, *words[:count]]), words[count:]
        yield flag, key, text


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


def help_text(settings, config_files=True):
    """What the script is for, in its own words, then every key with its type, default and comment,
    under the headings of the source."""
    comments, headings = _read_comments(settings)
    script = Path(sys.argv[0]).name or "script.py"
    positional = _positional(settings)
    words = "[CONFIG.py ...] " if config_files else ""
    if positional:
        words = f"{positional.upper()} ... "
    lines = [f"usage: python {script} {words}[--key=value ...]"]
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
        if alias := field.metadata.get("alias"):
            comment += f" (or --{alias})"
        if reason := field.metadata.get("fixed"):
            comment = f"nothing else: {reason}"
        separator = "  " if len(left) <= 42 else "\n" + " " * 44
        lines.append(f"{left:<42}{separator}{comment}".rstrip())
    return "\n".join(lines)


# ---- the command line ---------------------------------------------------------------------------


def _value_after(flag, kind, words):
    """(the value of a flag written without `=`, the words after it): True for a bare bool."""
    following = words[0] if words else None
    if following == "=":
        raise UserError(f"write {flag}=VALUE, without spaces")
    if bool in _alternatives(kind):
        if following is not None and following.lower() in TRUE | FALSE:
            return following, words[1:]
        return "True", words
    ends = _is_list(kind) and _length_of_list(words) == 0
    if following is None or ends or following.startswith("--"):
        raise UserError(f"{flag} needs a value ({_type_name(kind)}): write {flag}=VALUE")
    return following, words[1:]


def _length_of_list(words):
    """How many words there are before the next flag or config file."""
    ends = (i for i, word in enumerate(words) if word.startswith("--") or word.endswith(".py"))
    return next(ends, len(words))


def _from_text(flag, kind, text):
    """Read the text of a flag as the field's type."""
    expected = f"expected {_type_name(kind)}"
    for option in _alternatives(kind):
        if option is type(None):
            if text.lower() in ("none", "null"):
                return None
            continue
        try:
            return _convert(option, text)
        except OverflowError as error:
            expected = error
        except ValueError:
            continue
    raise UserError(f"{flag}={_short(text)}: {expected}")


def _convert(option, text):
    """`text` as one plain type; ValueError where it is not one, OverflowError where it is too
    large."""
    if option is bool:
        if text.lower() not in TRUE | FALSE:
            raise ValueError(text)
        return text.lower() in TRUE
    if typing.get_origin(option) is tuple:
        parts = (part.strip() for part in text.split(","))
        return tuple(_convert(typing.get_args(option)[0], part) for part in parts if part)
    return _in_range(option(text))


def _in_range(value):
    """A number that 64 bits hold, or anything else -> itself. Raises OverflowError, ValueError."""
    if isinstance(value, int) and abs(value) > LARGEST:
        raise OverflowError(f"too large, at most {LARGEST:,}")
    if isinstance(value, float) and math.isinf(value):
        raise OverflowError(f"too large, at most {sys.float_info.max:.2g}")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(value)
    return value


def _short(text):
    """A user's words, to be repeated in one line: whole where they may be a path."""
    return text if len(text) <= 160 else f"{text[:60]}... ({len(text):,} characters)"


# ---- config files -------------------------------------------------------------------------------


def _read_config_file(path, kinds, names):
    """Run a config file in a fresh namespace -> what it sets, checked, and how it names it."""
    if not os.path.isfile(path):
        key, near = path.partition("=")[0].replace("-", "_"), _near_file(path)
        hint = f"did you mean {near}?" if near else HOW_TO_WRITE
        if key in names:
            hint = f"did you mean --{_short(path)}?"
        elif os.path.isdir(path):
            hint = "it is a folder, give a file in it"
        raise UserError(f"no config file {_short(path)!r}: {hint}")
    try:
        namespace = runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (
        Exception,
        SystemExit,
    ) as error:  # the file is the user's own code: its errors are the user's
        line = _line_in(path, error)
        message = f"{path}{line}: {type(error).__name__}: {error}"
        raise UserError(message) from error
    ignored = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    values = {
        key: value
        for key, value in namespace.items()
        if not key.startswith("_") and not isinstance(value, ignored)
    }
    unset = [name for name in namespace.get("__annotations__", {}) if name not in namespace]
    if unset or not values and _has_code(path):  # "max_iters: 3", as in YAML; {"max_iters": 3}
        what = f"{unset[0]} is given no value" if unset else "nothing is set"
        raise UserError(f"{path}: {what}: a config file is Python, with lines as max_iters = 3")
    unknown = [key for key in values if key not in names]
    if unknown:
        more = "; names of the file's own begin with _"
        raise UserError(_unknown(unknown, names, f"in {path}") + more)
    keys = [names[name] for name in values]
    if twice := [name for name in values if keys.count(names[name]) > 1]:
        raise UserError(f"{path}: {' and '.join(twice)} are one setting: leave one out")
    checked = {names[n]: _checked(n, kinds[names[n]], v, path) for n, v in values.items()}
    return checked, {names[name]: name for name in values}


def _has_code(path):
    """Is there more than comments in a Python file?"""
    with tokenize.open(path) as file:
        return bool(ast.parse(file.read()).body)


def _near_file(path):
    """The config file in the same folder or in config/ whose name is most like `path`, or None."""
    folder, name = os.path.split(path)
    found = {}
    for place in (folder, "config"):
        with contextlib.suppress(OSError, ValueError):
            names = [name for name in os.listdir(place or ".") if name.endswith(".py")]
            found |= {name: os.path.join(place, name) for name in names if name not in found}
    near = difflib.get_close_matches(name.removesuffix(".py") + ".py", found, 1, 0.8)
    return found[near[0]] if near else None


def _line_in(path, error):
    """`, line N` of the last frame of `error` that lies in the file `path`."""
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return line


def _checked(key, kind, value, path):
    """A Python value from a config file, if it has the field's type and 64 bits hold it."""
    wrong = UserError(f"{path}: {key} = {value!r}: expected {_type_name(kind)}")
    try:
        for number in value if isinstance(value, (tuple, list)) else (value,):
            _in_range(number)
    except OverflowError as error:
        raise UserError(f"{path}: {key}: {error}") from None
    except ValueError:  # not a number
        raise wrong from None
    for option in _alternatives(kind):
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            if isinstance(value, (tuple, list)) and all(type(part) is item for part in value):
                return tuple(value)
        elif option is float and type(value) in (int, float):
            return float(value)
        elif type(value) is option:
            return value
    raise wrong


# ---- fields, their types and their comments -----------------------------------------------------


def _field_types(settings):
    hints = typing.get_type_hints(settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}


def _names(settings):
    """What each field may be called -> its own name."""
    fields = dataclasses.fields(settings)
    aliases = {f.metadata["alias"]: f.name for f in fields if "alias" in f.metadata}
    return {field.name: field.name for field in fields} | aliases


def _is_list(kind):
    return any(typing.get_origin(option) is tuple for option in _alternatives(kind))


def _check_values(settings, given):
    """Raise UserError where a field that has one value only was given another, and where a text
    was given that is empty (`--out_dir=$OUT`), but for those that are so by default."""
    for field in dataclasses.fields(settings):
        reason, only = field.metadata.get("fixed"), _default(field)
        if given.get(field.name) == "" != only:
            name = given.typed[field.name]
            raise UserError(f"--{name} is empty: give it a value, or leave it out")
        if reason and given.get(field.name, only) != only:
            raise UserError(
                f"{field.name}={given[field.name]} is not done here: {reason}; leave it out, or "
                f"give --{field.name}={only}"
            )


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


def _unknown(keys, names, where):
    """An error message that names each unknown key and the nearest key that exists."""
    described = []
    for key in keys:
        near = difflib.get_close_matches(key.lstrip("-").replace("-", "_"), names, 1, 0.6)
        described.append(_short(key) + (f" (did you mean {near[0]}?)" if near else ""))
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
