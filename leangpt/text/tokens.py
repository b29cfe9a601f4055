"""Tokenizers: encode(str) -> list[int], decode(list[int]) -> str, pieces(), vocab_size.

Nothing here needs torch, so preparing data starts at once.
"""

import os
import re
from pathlib import Path

from leangpt.system.errors import UserError
from leangpt.system.reading import parsing, regular_file
from leangpt.text.folder import GPT2_VOCAB_SIZE, read_meta
from leangpt.text.sources import gpt2_encoding

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of SentencePiece


class CharTokenizer:
    """One token a character; ids follow the order of `characters`."""

    def __init__(self, characters):
        self.characters = characters
        self.ids = {character: i for i, character in enumerate(characters)}
        self.vocab_size = len(characters)

    def encode(self, text):
        """Raises UserError naming the characters that the vocabulary lacks."""
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            named = " ".join(repr(character) for character in unknown[:10])
            raise UserError(
                f"the vocabulary of {self.vocab_size} characters lacks {named}"
                f"{' ...' if len(unknown) > 10 else ''}: leave them out or replace them"
            )
        return [self.ids[character] for character in text]

    def pieces(self):
        """The text of each id."""
        return list(self.characters)

    def decode(self, ids):
        """Ids beyond the vocabulary (a model may be padded) read as U+FFFD."""
        size = self.vocab_size
        return "".join(self.characters[i] if 0 <= i < size else "\ufffd" for i in ids)


class TableTokenizer:
    """Pieces of any length, as a word-level meta.pkl of nanoGPT's has them."""

    def __init__(self, pieces):
        self.table = pieces
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.longest = max(map(len, pieces))
        self.vocab_size = len(pieces)

    def encode(self, text):
        """The longest piece that fits, again and again. Raises UserError where none does."""
        ids, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self.longest), at, -1)
            end = next((end for end in ends if text[at:end] in self.ids), None)
            if end is None:
                raise UserError(
                    f"no piece of the vocabulary of {self.vocab_size} begins "
                    f"{text[at : at + 10]!r}: leave it out or replace it"
                )
            ids.append(self.ids[text[at:end]])
            at = end
        return ids

    def pieces(self):
        """The text of each id."""
        return list(self.table)

    def decode(self, ids):
        """Ids beyond the vocabulary (a model may be padded) read as U+FFFD."""
        return "".join(self.table[i] if 0 <= i < self.vocab_size else "\ufffd" for i in ids)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding through tiktoken; `<|endoftext|>` in a text is the one token."""

    vocab_size = GPT2_VOCAB_SIZE

    def __init__(self):
        self.encoding = gpt2_encoding()

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={"<|endoftext|>"})

    def pieces(self):
        """The text of each id; of parts of a character U+FFFD."""
        return [self.encoding.decode([i]) for i in range(self.vocab_size)]

    def decode(self, ids):
        """Ids beyond the vocabulary (nanoGPT pads it to 50304) are left out."""
        return self.encoding.decode([i for i in ids if 0 <= i < self.vocab_size])


class FileTokenizer:
    """Any Hugging Face tokenizer.json, through the `tokenizers` package."""

    def __init__(self, content, where):
        """content: of the file `where`, str. Raises UserError where it is no tokenizer.json."""
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"{where} needs the tokenizers package: pip install tokenizers"
            ) from error
        self.where = where
        with parsing(where, "is not a tokenizer.json"):
            self.tokenizer = tokenizers.Tokenizer.from_str(content)
        self.tokenizer.no_truncation()  # which a file may have saved with it
        self.tokenizer.no_padding()

    @classmethod
    def read(cls, path):
        """Of a file. Raises UserError where there is none."""
        if not os.path.isfile(path):
            raise UserError(f"no tokenizer file {path}")
        return cls(regular_file(path).read_text(encoding="utf-8", errors="replace"), path)

    @property
    def vocab_size(self):
        """One more than the largest id: there may be gaps, and tokens added after them."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def add(self, tokens, named=None):
        """Make [(text, special)] tokens whose text is never split, and named ({name: text}) too.

        Those that the vocabulary has keep their ids.
        """
        from tokenizers import AddedToken

        present = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        tokens = [*tokens, *((text, True) for text in (named or {}).values())]
        for text, special in tokens:
            if text not in present:
                token = AddedToken(text, special=special, normalized=not special)
                add = self.tokenizer.add_special_tokens if special else self.tokenizer.add_tokens
                add([token])
                present.add(text)

    def encode(self, text, add_special_tokens=True):
        """add_special_tokens: put around the text what the tokenizer has for that."""
        with parsing(self.where):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids):
        with parsing(self.where):
            return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def pieces(self):
        """The text of each id; of parts of a character U+FFFD, of a gap nothing."""
        alone = [[i] for i in range(self.vocab_size)]
        return self.tokenizer.decode_batch(alone, skip_special_tokens=False)

    def unsettled(self, token):
        """Whether it is a byte that SentencePiece reads together with those that follow: what
        several are is known when the last is there."""
        return BYTE.fullmatch(self.tokenizer.id_to_token(token) or "") is not None


def load_tokenizer(source):
    """The tokenizer of a Dataset, of a dataset folder, or of a meta dict (as checkpoints carry).

    A meta dict is {"tokenizer": "gpt2"}, {"tokenizer": "char", "characters": "..."} or
    {"tokenizer": "file", "path": "tokenizer.json"}, the path seen from the dataset's folder, or
    {"tokenizer": "model", "text_files": {name: content}} (text_files.py).
    """
    if isinstance(source, dict):
        directory, meta = Path(), source
    elif isinstance(source, (str, Path)):
        directory, meta = Path(source), read_meta(Path(source))
    else:
        directory, meta = source.directory, source.meta
    kind = meta.get("tokenizer")
    needed = {"char": "characters", "file": "path", "table": "pieces"}.get(kind)
    if needed and not isinstance(meta.get(needed), list if kind == "table" else str):
        raise UserError(
            f"the meta data names the tokenizer {kind!r} but gives no {needed!r}: "
            "prepare the dataset again"
        )
    if kind == "char":
        return CharTokenizer(meta["characters"])
    if kind == "table":
        return TableTokenizer(meta["pieces"])
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "model":  # its own special tokens and chat format: model_text.text_of_data
        files = meta.get("text_files") or {}
        if not isinstance(files.get("tokenizer.json"), str):
            raise UserError("the data set lacks its model's tokenizer.json: prepare it again")
        return FileTokenizer(files["tokenizer.json"], "the data set's tokenizer.json")
    if kind == "file":
        return FileTokenizer.read(directory / meta["path"])
    raise UserError(f"unknown tokenizer {kind!r}: it must be char, gpt2, file, model or table")
