"""Files that are written whole or not at all, and one clear line where they cannot be."""

import contextlib
import os
from pathlib import Path

from leangpt.system.errors import UserError


@contextlib.contextmanager
def written_whole(path):
    """`with written_whole(path) as temporary:` write that file (a Path); then it becomes `path`.

    Makes the folder. Whatever goes wrong leaves an older `path` as it was and no temporary file;
    a folder that cannot be written or a full disk is a UserError.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
