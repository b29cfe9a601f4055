"""`sample.py --chat`: from a pipe and from a terminal, with Ctrl-C, Ctrl-D and broken input."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from pretrained_files import chat_model

import sample
from leangpt.decoding.chat import chat
from leangpt.system.errors import UserError

ROOT = os.path.dirname(sample.__file__)
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


def command(model, *flags):
    fixed = "--chat --device=cpu --temperature=0 --max_new_tokens=6".split()
    return [sys.executable, f"{ROOT}/sample.py", f"--init_from={model}", *fixed, *flags]


def piped(model, content, *flags, **environment):
    done = subprocess.run(
        command(model, *flags),
        input=content,
        capture_output=True,
        timeout=120,
        env=os.environ | environment,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode()


@pytest.mark.slow
def test_from_a_pipe(model):
    status, out, err = piped(model, b"he said\n\n  \nhe\n")
    assert (status, err) == (0, "")
    said = out.split("ends the chat\n")[1]
    assert "> " not in said and said.count("\n") >= 3 and "tokens read" in said
    # the second answer is that of the whole history
    again = piped(model, b"\xef\xbb\xbfhe said\nhe")[1].split("ends the chat\n")[1]
    assert again == said


@pytest.mark.slow
def test_what_is_no_text_and_what_is_too_long(model):
    status, out, err = piped(model, b"caf\xe9\n" + b"x" * 300 + b"\nhe\n")
    assert (status, err) == (0, "")
    assert "not UTF-8 text, so it was not sent" in out
    assert "and the model reads 64: shorten it" in out


@pytest.mark.slow
def test_old_turns_are_forgotten(model):
    status, out, err = piped(model, b"he said that he said\n" * 4, "--max_new_tokens=2")
    assert (status, err) == (0, "") and "oldest messages no longer fit and are forgotten" in out


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_another_encoding(model, encoding):
    status, out, err = piped(
        model, "he said ünï 猫\n".encode(), PYTHONIOENCODING=encoding, PYTHONUTF8="0", LC_ALL="C"
    )
    assert (status, err) == (0, "") and "tokens read" in out


@pytest.mark.slow
def test_a_reader_that_goes_away(model):
    shell = " ".join(command(model)) + " | head -1; exit ${PIPESTATUS[0]}"
    done = subprocess.run(
        ["bash", "-c", f"yes 'he said' | head -200 | {shell}"], capture_output=True, timeout=120
    )
    assert b"Traceback" not in done.stderr and done.stdout.count(b"\n") == 1


class Terminal:
    """sample.py on a terminal of its own."""

    def __init__(self, *argv):
        self.screen = b""
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.execv(argv[0], argv)

    def wait_for(self, text, seconds=60):
        end, start = time.monotonic() + seconds, len(self.screen)
        while text not in self.screen[start:]:
            assert time.monotonic() < end, self.screen
            if select.select([self.handle], [], [], 0.2)[0]:
                try:
                    self.screen += os.read(self.handle, 4096)
                except OSError:  # it ended
                    break
        return self.screen[start:]

    def type(self, text):
        os.write(self.handle, text)

    def end(self, seconds=60):
        """Its exit status; of one that goes on, what a SIGKILL makes of it."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        while not ended:
            if (seconds := seconds - 0.1) < 0:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.1)
            ended, status = os.waitpid(self.pid, os.WNOHANG)
        os.close(self.handle)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.slow
def test_on_a_terminal_until_ctrl_d(model):
    screen = Terminal(*command(model))
    screen.wait_for(b"> ")
    screen.type(b"he said\r")
    screen.wait_for(b"> ")
    screen.type(b"\x04")
    assert b"Traceback" not in screen.wait_for(b"written") and screen.end() == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_chat(model):
    screen = Terminal(*command(model, "--max_new_tokens=100000", "--kv_bits=8"))
    screen.wait_for(b"> ")
    screen.type(b"he\r")
    screen.wait_for(b"\n")  # the line has been read
    time.sleep(0.05)
    screen.type(b"\x03")
    screen.wait_for(b"> ")  # the chat goes on
    screen.type(b"\x03")
    assert screen.end() == 130 and b"Traceback" not in screen.screen


def test_ctrl_c_in_the_middle_of_an_answer(capsys, monkeypatch):
    """What was said stays said, and the next message follows it."""
    texts = []

    class Endless:
        model = SimpleNamespace(config=SimpleNamespace(block_size=100))

        def answer(self, ids, max_new_tokens):
            texts.append("".join(map(chr, ids)))
            for i in range(max_new_tokens):
                if i == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                yield ord("x")

    class Text:
        tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
        stop_tokens = ()

        def chat_ids(self, messages):
            return [ord(c) for m in messages for c in m["content"] + "|"]

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"he\nsaid\n")))
    usual = signal.getsignal(signal.SIGINT)
    assert chat(Endless(), Text(), 50) == 6 and signal.getsignal(signal.SIGINT) is usual
    assert capsys.readouterr().out.splitlines()[1:] == ["xxx", "xxx"]
    assert texts == ["he|", "he|xxx|said|"]


def test_mistakes(model, tmp_path):
    with pytest.raises(UserError, match="num_samples means nothing in a chat"):
        sample.main([f"--init_from={model}", "--chat", "--num_samples=3"])
    bare = chat_model(tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no chat format"):
        sample.main([f"--init_from={bare}", "--chat", "--device=cpu"])
