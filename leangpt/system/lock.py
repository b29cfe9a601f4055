"""One process at a time in a folder, by a lock that dies with its holder."""

import os
import platform
from pathlib import Path

from leangpt.system.errors import UserError, refused

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None

NAME = ".lock"


class FolderLock:
    """Holds a folder from construction to `release`, or until this process ends, however it ends.

    The lock is flock(2)'s, on a file `.lock` in the folder: the kernel undoes it, so nothing that a
    killed process leaves behind is in anybody's way. On NFS Linux asks the server, so that another
    machine is held off too. A file system without locks holds nobody off.
    """

    def __init__(self, folder, wait=None):
        """Make `folder` and lock it. Raises UserError where it cannot be written to, and where
        another process holds it; with `wait`, which is told so in a line, this waits instead."""
        self.folder, self.wait = Path(folder), wait
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._locked_file()
        except OSError as error:
            raise refused(f"cannot write to {folder}", error) from None

    def _locked_file(self):
        while True:
            file = open(self.folder / NAME, "a+")  # noqa: SIM115  (open as long as the lock holds)
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another"
                if self.wait is not None:
                    self.wait(f"{self.folder} is in use by process {holder}: waiting for its end")
                    fcntl.flock(file, fcntl.LOCK_EX)
                    file.close()  # its holder has removed it: lock the folder's next one
                    continue
                file.close()
                raise UserError(
                    f"{self.folder} is in use by process {holder}: wait for its end, or give "
                    "another folder"
                ) from None
            except OSError:  # no locks here, as on some network file systems
                return file
            if self._is_ours(file):
                file.truncate(0)
                file.write(f"{os.getpid()} on {platform.node()}\n")
                file.flush()
                return file
            file.close()  # whoever held it has removed it, or moved the folder, in between

    def _is_ours(self, file):
        """Is the file that is open still the one in the folder?"""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.folder / NAME))
        except FileNotFoundError:
            return False

    def moved(self, folder):
        """The folder was renamed to `folder`: what is held is that one."""
        self.folder = Path(folder)

    def release(self):
        """Let others in. May be called again."""
        if self._file.closed:
            return
        if self._is_ours(self._file):
            (self.folder / NAME).unlink()
        self._file.close()
