"""A text on the terminal as its tokens come."""

import sys

REACH = 4  # tokens of context: what a decoder makes of one depends on its neighbours


class Printer:
    """Prints a text as its tokens come, holding back a character until all its bytes are there.

    What it has printed in the end is what decode makes of all tokens at once: of the prompt's and
    the new ones with `show_prompt`, else of the new ones alone.
    tokenizer: has decode(list[int]) -> str, and may have unsettled(int) -> bool, whether the text
    of a token may change with the next one. ids: the prompt.
    """

    def __init__(self, tokenizer, stop_tokens, ids, show_prompt=True):
        self.decode, self.stop_tokens = tokenizer.decode, stop_tokens
        self.unsettled = getattr(tokenizer, "unsettled", lambda token: False)
        self.ids, self.done = [], 0  # tokens, and how many of them are printed
        self.shown, self.since = "", 0  # what is printed of the text from token `since` on
        if show_prompt and ids:
            self.ids = list(ids)
            self.show_settled()

    def __call__(self, tokens):
        """generate's `stream`: the newest token of the only row."""
        if tokens[0] not in self.stop_tokens:
            self.ids.append(tokens[0])
            self.show_settled()

    def show_settled(self):
        """Print what is new, unless its end may still change."""
        new = self.new_text()
        if not new.endswith("\ufffd") and not self.unsettled(self.ids[-1]):
            self.show(new)
            self.shown += new
            self.done = len(self.ids)
            self.forget()

    def forget(self):
        """Tokens long printed are not decoded again, as long as the rest reads alike without."""
        since = self.done - REACH
        if since - self.since >= REACH:
            shorter = self.decode(self.ids[since:])
            if shorter and self.shown.endswith(shorter):
                self.since, self.shown = since, shorter

    def new_text(self):
        """What the tokens not yet printed add to those before."""
        return self.decode(self.ids[self.since :])[len(self.shown) :]

    def show(self, text):
        """Print without a line's end, at once."""
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
