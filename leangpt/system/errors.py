"""What a user did wrong, or what happened to a run, in one line. Everything else is a bug and keeps
its traceback."""

import contextlib
import errno
import io
import os
import re
import sys

# what the operating system says where a path or the rights to it are at fault, not the machine
OF_THE_NAME = {
    getattr(errno, name)
    for name in (
        "ENAMETOOLONG EACCES EPERM EROFS ENOTDIR EISDIR ENOENT EEXIST ENOTEMPTY ELOOP EXDEV"
    ).split()
}
SIGNS_OF_NO_MEMORY = (  # in the text of a RuntimeError of torch's
    "DefaultCPUAllocator",
    "bad_alloc",
    "Storage size calculation overflowed",
    "out of memory",
)


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, and what to do about it."""

    status = 2  # with which a script ends


class RunError(UserError):
    """What happened to a run whose input was right: a full disk, say. One line as well."""

    status = 1


def refused(doing: str, error: OSError) -> UserError:
    """ "`doing`: why the operating system refused it", a UserError or, if no input is to blame, a
    RunError."""
    kind = UserError if error.errno in OF_THE_NAME else RunError
    return kind(f"{doing}: {error.strerror or error}")


@contextlib.contextmanager
def named_as_typed(typed: dict[str, str]):
    """What a UserError in here says of a setting, it says by the name that the user gave it.

    typed: {key: the name that was typed}. A key without `_` may be a word like any other: it is
    a setting after `--` and before `=`.
    """
    try:
        yield
    except UserError as error:
        message = str(error)
        for key, name in typed.items():
            pattern = rf"(?<![\w/.]){key}(?!\w)"
            if "_" not in key:
                pattern = rf"(?<=--){key}(?!\w)|(?<=unknown ){key}(?!\w)|(?<![\w/.]){key}(?==)"
            message = re.sub(pattern, name, message)
        error.args = (message,)
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Is this exception one of CUDA's, Python's or the CPU allocator's for exhausted memory?"""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_NO_MEMORY)
    )


def exit_cleanly(main):
    """Run `main()`; on a UserError print `error: ...` on stderr and exit with its status, 2 or 1.

    What the operating system refuses, in whatever place, and memory that does not suffice are one
    line too. Ctrl-C ends with 130, and a reader that went away (`| head`) with 141, as in a shell.
    What the terminal cannot show, being ASCII or Latin-1, is written as an escape. Standard output
    and error may be closed: nobody reads them then.
    """
    _open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write, sys.stdout.flush = _named(sys.stdout.write), _named(sys.stdout.flush)
    try:
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
        sys.stdout.flush()
    except UserError as error:
        _end(error, error.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        discard(sys.stdout)
        sys.exit(141)
    except OSError as error:
        error = refused(error.filename or "the system refuses", error)
        _end(error, error.status)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _end(f"out of memory ({str(error) or 'no more is to be had'})", 1)


def discard(stream):
    """From here on what is written to stdout or stderr goes nowhere, what is buffered included."""
    with contextlib.suppress(OSError):  # a stream of no file, or no file left to be opened
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_streams():
    """Put nothing where standard input, output or error is closed: the next file that is opened
    would take its number, and whatever anybody prints."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))


def _named(call):
    """`call`, a method of stdout's, whose OSError says of what file it is."""

    def named(*arguments):
        try:
            return call(*arguments)
        except OSError as error:
            error.filename = error.filename or "standard output"
            raise

    return named


def _end(error, status):
    """Say an error in a line, as far as there is anybody to hear it, and exit."""
    with contextlib.suppress(OSError, ValueError):
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # or the interpreter would try again as it ends, and complain
            discard(stream)
        except ValueError:  # closed
            pass
    sys.exit(status)
