"""What a user did wrong, said in one line. Everything else is a bug and keeps its traceback."""

import io
import os
import sys


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, and what to do about it."""


def exit_cleanly(main):
    """Run `main()`; on a UserError print `error: ...` on stderr and exit with status 2.

    Ctrl-C ends with 130, and a reader that went away (`| head`) with 141, as in a shell. What the
    terminal cannot show, being ASCII or Latin-1, is written as an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush
        sys.exit(141)
