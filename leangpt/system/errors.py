"""What a user did wrong, said in one line. Everything else is a bug and keeps its traceback."""

import contextlib
import errno
import io
import os
import sys


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, and what to do about it."""


def exit_cleanly(main):
    """Run `main()`; on a UserError print `error: ...` on stderr and exit with status 2.

    What the operating system refuses, in whatever place, is one line too: status 2 where it is the
    name's fault, else 1. Ctrl-C ends with 130, and a reader that went away (`| head`) with 141, as
    in a shell. What the terminal cannot show, being ASCII or Latin-1, is written as an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _say(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        discard(sys.stdout)
        sys.exit(141)
    except OSError as error:
        _say(error)
        sys.exit(2 if error.errno == errno.ENAMETOOLONG else 1)


def discard(stream):
    """From here on what is written to stdout or stderr goes nowhere, what is buffered included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(error):
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
