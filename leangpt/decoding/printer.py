"""A text on the terminal as its tokens come."""

import sys


class Printer:
    """Prints a text as its tokens come, holding back a character until all its bytes are there.

    tokenizer: has decode(list[int]) -> str. ids: the prompt, shown first if `show_prompt`.
    """

    def __init__(self, tokenizer, stop_tokens, ids, show_prompt=True):
        self.decode, self.stop_tokens, self.ids = tokenizer.decode, stop_tokens, list(ids)
        self.since = self.done = len(ids)  # a few tokens of context, then what is not yet printed
        if show_prompt:
            self.show(self.decode(self.ids))

    def __call__(self, tokens):
        """generate's `stream`: the newest token of the only row."""
        if tokens[0] in self.stop_tokens:
            return
        self.ids.append(tokens[0])
        new = self.new_text()
        if not new.endswith("\ufffd"):
            self.show(new)
            self.since, self.done = self.done, len(self.ids)

    def new_text(self):
        before = self.decode(self.ids[self.since : self.done])
        return self.decode(self.ids[self.since :])[len(before) :]

    def show(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self):
        """What was held back, whole or not, and a new line."""
        self.show(self.new_text() + "\n")


def until_stop(row, start, stop_tokens):
    """row (list[int]) without what follows its first stop token from `start` on, nor that token."""
    for i, token in enumerate(row[start:], start):
        if token in stop_tokens:
            return row[:i]
    return row
