"""A chat on the terminal: lines in, answers out as their tokens come, until the input ends."""

import contextlib
import signal
import sys

from leangpt.decoding.printer import Printer

HELP = "a line is a message; Ctrl-C stops an answer, Ctrl-D ends the chat"


def chat(conversation, text, max_new_tokens: int) -> int:
    """Talk until standard input ends -> the number of tokens written.

    conversation: a Conversation; text: the model's, with chat_ids(messages) and a tokenizer
    (leangpt/text/model_text.py). Ctrl-C at the prompt is a KeyboardInterrupt, as anywhere.
    """
    asked, written, messages = sys.stdin.isatty(), 0, []
    if asked:
        with contextlib.suppress(ImportError):  # lines can be edited, where there is such a thing
            import readline  # noqa: F401
    print(f"chat: {HELP}", flush=True)
    for line in lines(asked):
        messages.append({"role": "user", "content": line})
        ids = fitting(text, messages, conversation.model.config.block_size)
        if ids is None:
            messages.pop()
            continue
        answer = []
        printer = Printer(text.tokenizer, text.stop_tokens, [], show_prompt=False)
        with Interrupt() as interrupt:
            for token in conversation.answer(ids, max_new_tokens):
                answer.append(token)
                printer([token])
                if interrupt.came:
                    break
        printer.end()
        written += len(answer)
        messages.append({"role": "assistant", "content": text.tokenizer.decode(answer)})
    return written


def lines(asked):
    """The messages that standard input has, a line each; `asked`: from a terminal, with a prompt.

    Empty lines are none. A line that is no text is said, and left out.
    """
    first = True
    while True:
        try:
            if asked:
                line = input("> ")
            else:
                line = sys.stdin.buffer.readline()
                if not line:
                    return
                line = line.decode("utf-8-sig" if first else "utf-8")
            line.encode()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            raise
        except UnicodeError:
            print("that line is not UTF-8 text, so it was not sent", flush=True)
            continue
        first = False
        if line.strip():
            yield line.rstrip("\r\n")


def fitting(text, messages, block_size):
    """The prompt (list[int]) for the next answer, the oldest turns forgotten where all do not fit
    with a quarter of the context left for it. None, and said, where the newest alone does not."""
    forgotten = 0
    while True:
        ids = text.chat_ids(messages)
        if len(ids) <= block_size * 3 // 4 or len(messages) == 1:
            break
        del messages[:2]
        forgotten += 2
    if forgotten:
        print(f"(the {forgotten} oldest messages no longer fit and are forgotten)", flush=True)
    if len(ids) >= block_size:
        print(
            f"(that message has {len(ids):,} tokens with its chat format, and the model reads "
            f"{block_size:,}: shorten it)",
            flush=True,
        )
        return None
    return ids


class Interrupt:
    """`with Interrupt() as interrupt:` a Ctrl-C is remembered, `interrupt.came`; a second one at
    the same answer has its usual effect."""

    def __enter__(self):
        self.came = False
        self.usual = signal.signal(signal.SIGINT, self._receive)
        return self

    def _receive(self, number, frame):
        if self.came:
            raise KeyboardInterrupt
        self.came = True

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self.usual)
