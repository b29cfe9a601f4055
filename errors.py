"""What a user did wrong, said in one line. Everything else is a bug and keeps its traceback."""

import sys


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, and what to do about it."""


def exit_cleanly(main):
    """Run `main()`; on a UserError print `error: ...` on stderr and exit with status 2."""
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
