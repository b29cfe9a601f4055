"""How a script ends: one line, a status that says whose fault it was, no stream that it needs."""

import subprocess
import sys

import pytest
from tiny_run import ROOT


def ending(body, *, shell='"$0" -c "$1"'):
    """A process that runs `body` within exit_cleanly -> CompletedProcess."""
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    program = f"""
import errno, os, sys
from leangpt.system.errors import *
from leangpt.system.whole_files import *
def main():
{lines}
exit_cleanly(main)
"""
    command = ["bash", "-c", shell, sys.executable, program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "body, status, line",
    [
        ("raise UserError('no such thing')", 2, "no such thing"),
        ("raise RunError('gone')", 1, "gone"),
        ("raise OSError(errno.ENOSPC, 'No space left on device', 'f')", 1, "f: No space left on"),
        ("open('/nowhere/at/all')", 2, "/nowhere/at/all: No such file or directory"),
        ("open('x' * 999)", 2, "x: File name too long"),
        ("raise OSError('of no number')", 1, "the system refuses: of no number"),
        ("raise MemoryError", 1, "out of memory (no more is to be had)"),
        ("raise RuntimeError('CUDA out of memory. Tried')", 1, "out of memory (CUDA out of memory"),
        (
            "with written_whole('a/b') as f:\n    raise OSError(errno.EDQUOT, 'Quota exceeded')",
            1,
            "cannot write a/b: Quota exceeded",
        ),
    ],
)
def test_one_line_and_a_status(body, status, line, tmp_path):
    body = f"os.chdir({str(tmp_path)!r})\n{body}"
    done = ending(body)
    assert done.returncode == status and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert line in done.stderr


def test_a_bug_keeps_its_traceback():
    done = ending("raise RuntimeError('size mismatch')")
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_nobodys_files(tmp_path, closed):
    """The next file that is opened must not become standard output, and get what is printed."""
    path = tmp_path / "file"
    body = f"""with open({str(path)!r}, "w") as file:
    print("said")
    print("said", file=sys.stderr)
    os.system("echo said; echo said >&2")
    file.write("kept")
raise UserError("ends")"""
    done = ending(body, shell=f'"$0" -c "$1" {closed}')
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert path.read_text() == "kept"


@pytest.mark.parametrize(
    "streams, status", [(">/dev/full", 1), (">/dev/full 2>&1", 1), ("2>/dev/full", 2)]
)
def test_full_streams(streams, status):
    done = ending("print('said')\nraise UserError('wrong')", shell=f'"$0" -c "$1" {streams}')
    assert done.returncode == status
    done = ending("print('said')", shell=f'"$0" -c "$1" {streams}')
    assert done.returncode == (0 if status == 2 else 1)
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1


@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)", "print('x' * 99999)"])
@pytest.mark.parametrize("after", ["", "\nsys.exit(0)", "\nsys.exit()"])
def test_a_full_standard_output_is_named(body, after):
    done = ending(body + after, shell='"$0" -c "$1" >/dev/full')
    assert done.returncode == 1
    assert done.stderr == "error: standard output: No space left on device\n"
