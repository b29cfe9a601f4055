import contextlib
import os
import platform
import signal
import subprocess
import sys

import pytest
from tiny_run import ROOT

from leangpt.system import lock
from leangpt.system.errors import UserError
from leangpt.system.lock import FolderLock

HOLDER = """
import sys, time
from leangpt.system.lock import FolderLock
lock = FolderLock(sys.argv[1])
print("held", flush=True)
time.sleep(300)
"""


@contextlib.contextmanager
def another_process_holding(folder):
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_holder_leaves_nothing_in_the_way(tmp_path):
    folder = tmp_path / "run"
    with another_process_holding(folder) as holder:
        with pytest.raises(
            UserError, match=f"run is in use by process {holder.pid} on {platform.node()}: wait"
        ):
            FolderLock(folder)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert os.listdir(folder) == [".lock"]  # its file, which nobody holds
        FolderLock(folder).release()
    assert os.listdir(folder) == []


def test_held_in_one_process_too_until_released(tmp_path):
    held = FolderLock(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        FolderLock(tmp_path)
    held.release()
    held.release()
    again = FolderLock(tmp_path)
    held.release()  # whose lock is gone: it takes nobody else's
    with pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path)
    again.release()


def test_a_lock_whose_file_is_gone_or_moved_is_not_held(tmp_path, monkeypatch):
    """The second opens the file, the first lets go and removes it, a third makes a new one."""
    first, third = FolderLock(tmp_path), []
    flock = lock.fcntl.flock

    def let_go(file, how):
        monkeypatch.setattr(lock.fcntl, "flock", flock)
        first.release()
        third.append(FolderLock(tmp_path))
        return flock(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", let_go)
    with pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path)
    third[0].release()


def test_no_locks_there_hold_nobody_off(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    one, two = FolderLock(tmp_path), FolderLock(tmp_path)
    two.release()
    one.release()
    monkeypatch.setattr(lock, "fcntl", None)  # Windows
    FolderLock(tmp_path).release()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for name in ("file", "file/folder", "x" * 5000):
        with pytest.raises(UserError, match="^cannot write to ") as caught:
            FolderLock(tmp_path / name)
        assert "\n" not in str(caught.value)
