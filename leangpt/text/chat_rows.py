"""Conversations as rows of tokens to train on, in the model's own chat format.

A line of the file is {"messages": [{"role": "user", "content": "..."}, ...]}. What the model is to
learn are the assistant's tokens: those between the template's request for an answer and the end of
that answer, the token that ends it included; all others are read, and have no loss. A row holds one
conversation and is padded: attention never crosses from one to another.

Some templates write earlier turns otherwise than the last one (Qwen3 leaves out old reasoning).
There a conversation becomes a row for each answer, just as the model will see it when it answers.
"""

import json
from dataclasses import dataclass, field

import numpy as np

from leangpt.system.errors import UserError, refused
from leangpt.system.reading import regular_file
from leangpt.text.integrity import NO_LOSS
from leangpt.text.model_text import ModelText

ROLES = ("system", "user", "assistant", "tool")
TOGETHER = 16  # conversations whose templates are filled in by one process
TOO_LONG = ("refuse", "cut", "drop")


@dataclass
class Row:
    """One row before it is padded."""

    ids: list[int]
    answered: list[bool]  # is this token the assistant's?
    line: int  # of the file


@dataclass
class Counts:
    """What became of a file's conversations."""

    conversations: int = 0
    split: int = 0  # into a row an answer
    cut: int = 0  # after block_size + 1 tokens
    dropped: int = 0  # for their length, or for an answer that begins beyond it
    endless: int = 0  # rows with an answer that no stop token ends
    tokens: int = 0  # of the rows that are kept, padding aside
    answered: int = 0  # of those the assistant's
    longest: int = 0
    lines: list[int] = field(default_factory=list)  # the first of a few that are too long


def read_conversations(path):
    """Yield (line number, messages) of a JSONL file. Raises UserError naming file and line.

    Empty lines and a byte order mark are passed over; other keys of a line or message are left
    alone.
    """
    try:
        with open(regular_file(path), encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _messages(line, f"{path}, line {number}")
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})") from None


def _messages(line, where):
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: needs {{"messages": [...]}} with at least one message')
    for index, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: message {index} needs a role: {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: message {index} needs a content that is a text")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: the conversation has no assistant's turn to learn from")
    return messages


def conversation_rows(path, text: ModelText, counts: Counts):
    """Yield, for each conversation of a file, the Rows it makes (not cut yet).

    text: the model's; its tokenizer is a FileTokenizer. Raises UserError naming file and line.
    """
    waiting = []
    for entry in read_conversations(path):
        waiting.append(entry)
        if len(waiting) == TOGETHER:
            yield from _several(path, waiting, text, counts)
            waiting = []
    yield from _several(path, waiting, text, counts)


def _several(path, entries, text, counts):
    """The rows of a few conversations: all texts that they need are made by one process."""
    wanted = []
    for _, messages in entries:
        for i in answers(messages):
            wanted += [(messages[:i], True), (messages[: i + 1], False)]
        wanted.append((messages, False))
    try:
        made = iter(text.chats(wanted) if wanted else [])
    except UserError as error:
        if len(entries) == 1:
            raise UserError(f"{path}, line {entries[0][0]}: {error}") from None
        for entry in entries:  # which of them is it?
            yield from _several(path, [entry], text, counts)
        return
    for line, messages in entries:
        turns = [(next(made), next(made)) for _ in answers(messages)]
        whole = next(made)
        for prompt, answer in turns:
            if not answer.startswith(prompt):
                raise UserError(
                    f"{path}, line {line}: the model's chat format does not go on from the request "
                    "for an answer to the answer: what the assistant said cannot be told apart"
                )
        counts.conversations += 1
        if all(whole.startswith(answer) for _, answer in turns):
            spans = [(len(prompt), len(answer)) for prompt, answer in turns]
            yield [_row(whole, spans, text, line, counts)]
        else:
            counts.split += 1
            yield [
                _row(answer, [(len(prompt), len(answer))], text, line, counts)
                for prompt, answer in turns
            ]


def answers(messages):
    """Places of the assistant's messages."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _row(whole, spans, text, line, counts):
    """The tokens of a text; those that begin inside a span of characters are the assistant's.

    A span ends with its last stop token, whatever the template writes after it.
    """
    encoding = text.tokenizer.tokenizer.encode(whole, add_special_tokens=False)
    ids, starts = encoding.ids, [start for start, _ in encoding.offsets]
    answered, endless = [False] * len(ids), False
    for first, stop in spans:
        mine = [i for i, start in enumerate(starts) if first <= start < stop]
        ends = [i for i in mine if ids[i] in text.stop_tokens]
        endless |= not ends
        for i in mine:
            answered[i] = not ends or i <= ends[-1]
    counts.endless += endless
    counts.longest = max(counts.longest, len(ids))
    return Row(ids, answered, line)


def fit_rows(conversations, row_tokens, too_long, counts: Counts):
    """Yield, for each conversation, its rows of at most row_tokens tokens with an answer in each.

    too_long: "refuse" keeps rows as they are and their lines in `counts`, for the caller to refuse
    them all; "cut" drops what is beyond; "drop" drops the row.
    """
    for rows in conversations:
        kept = []
        for row in rows:
            if len(row.ids) > row_tokens:
                counts.lines += [row.line] if len(counts.lines) < 3 else []
                if too_long == "cut":
                    counts.cut += 1
                    row = Row(row.ids[:row_tokens], row.answered[:row_tokens], row.line)
                elif too_long == "drop":
                    row = Row([], [], row.line)
            if not any(row.answered[1:]):  # nothing precedes a row's first token
                counts.dropped += 1
                continue
            counts.tokens += len(row.ids)
            counts.answered += sum(row.answered)
            kept.append(row)
        if kept:
            yield kept


def padded(rows, row_tokens, padding):
    """Rows as they lie in a .bin file: (n row_tokens,) uint32, NO_LOSS on all but answers."""
    out = np.full((len(rows), row_tokens), padding + NO_LOSS, np.uint32)
    for place, row in zip(out, rows):
        marks = np.where(row.answered, 0, NO_LOSS)
        place[: len(row.ids)] = np.array(row.ids, np.int64) + marks
    return out.reshape(-1)
