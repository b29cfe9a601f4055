"""The text side of a model: tokenizer, ids that end a text, chat format."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from leangpt.system.errors import UserError
from leangpt.text.chat_template import render_several
from leangpt.text.folder import read_meta
from leangpt.text.sources import gpt2_vocabulary
from leangpt.text.text_files import GENERATION, SETTINGS, TEMPLATE, TOKENIZER, parse
from leangpt.text.tokenizer_json import byte_level_bpe, read_merges, table
from leangpt.text.tokens import (
    CharTokenizer,
    FileTokenizer,
    GPT2Tokenizer,
    TableTokenizer,
    load_tokenizer,
)

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
END_OF_GPT2 = "<|endoftext|>"
CLASS_TOKENS = {  # what a class of `transformers` has where the files name none
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_GPT2),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}


@dataclass
class ModelText:
    """A model's words: its tokenizer, where its texts end, its chat format, and their files."""

    tokenizer: object  # text.tokens: encode(str) -> list[int], decode(list[int]) -> str
    stop_tokens: tuple[int, ...] = ()  # generation ends at any of these
    template: str | None = None  # the chat format, in Jinja; None: the model has none
    special_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...
    files: dict[str, str] = field(default_factory=dict)  # text_files.py: what goes with the model
    notes: list[str] = field(default_factory=list)  # what had to be assumed, a line each
    sampled: int | None = None  # ids below it are sampled; None: all that the model has

    def chat(self, messages: str | list[dict]) -> str:
        """The prompt that asks the model for its next answer, as apply_chat_template makes it.

        messages: one user's text, or a list of {"role": "system"|"user"|"assistant",
        "content": str}. The template comes from a stranger, so it runs in Jinja's sandbox, in a
        process that sees these values alone and is given little time and memory. Raises UserError
        where there is no template, or it fails.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.chats([(messages, True)])[0]

    def chats(self, wanted: list[tuple[list[dict], bool]]) -> list[str]:
        """The text of each (messages, ask for the next answer?), at the price of one."""
        if self.template is None:
            raise UserError("this model has no chat format; prompt it without chat")
        if find_spec("jinja2") is None:
            raise UserError("chat formats need jinja2: pip install jinja2")
        fixed = dict(tools=None, documents=None) | self.special_tokens
        values = [dict(messages=m, add_generation_prompt=ask) | fixed for m, ask in wanted]
        try:
            return render_several(self.template, values)
        except ValueError as error:
            raise UserError(f"the model's chat format cannot be filled in ({error})") from None

    def chat_ids(self, messages: str | list[dict]) -> list[int]:
        """The same as tokens: with the special tokens that the template writes, and no others."""
        return self.tokenizer.encode(self.chat(messages), add_special_tokens=False)


def text_of_files(files: dict[str, str], where, notes: Iterable[str] = ()) -> ModelText:
    """ModelText of the files of text_files.py, read as `transformers` reads them.

    where: what to call their folder. Raises UserError for damaged ones.
    """
    settings = parse(files, SETTINGS, where)
    special = _special_tokens(files, settings, where)
    ends = parse(files, GENERATION, where).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    # -1, or as GGUF has it 2^32 - 1, is no token's: some write it for none
    if not all(type(end) is int and -1 <= end < 2**32 for end in ends):
        raise UserError(
            f"{where}: eos_token_id must be a token's number or a list, not {ends!r:.80}"
        )
    template = files[TEMPLATE] if TEMPLATE in files else _template(settings, where)
    tokenizer = FileTokenizer(files[TOKENIZER], f"{where}/{TOKENIZER}")
    tokenizer.add(_added_tokens(settings), special)
    return ModelText(tokenizer, tuple(ends), template or None, special, dict(files), list(notes))


def _special_tokens(files, settings, where):
    """{name: text}: special_tokens_map.json counts where tokenizer_config.json is an older one."""
    named = {}
    older = parse(files, "special_tokens_map.json", where)
    sources = [(SETTINGS, settings)]
    if "added_tokens_decoder" not in settings:
        sources.append(("special_tokens_map.json", older))
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    named |= CLASS_TOKENS.get(kind, {})
    for file, source in sources:
        for name in NAMED_TOKENS:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise UserError(f"{where}/{file}: {name} must be a text, not {token!r}")
            if token:
                named[name] = token
    return named


def _added_tokens(settings):
    """[(text, special)] in the order of their ids, of tokenizer_config.json."""
    added = settings.get("added_tokens_decoder")
    entries = added.items() if isinstance(added, dict) else ()
    entries = [(number, token) for number, token in entries if isinstance(token, dict)]
    entries = [
        (int(number), token["content"], bool(token.get("special", True)))
        for number, token in entries
        if str(number).isdigit() and isinstance(token.get("content"), str)
    ]
    return [(text, special) for _, text, special in sorted(entries)]


def _template(settings, where):
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name: [{"name": ..., "template": ...}]
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in entries}.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{where}/{SETTINGS}: chat_template must be a text")
    return template


DATA_TEXTS = ("name", "folder", "tokenizer", "characters", "path", "source", "sha256")


def check_data(data, where) -> None:
    """Raise UserError, beginning with `where`, unless `data` may say what a model was trained on: a
    dict, whose entries that are texts are texts, or None."""
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{where} is damaged: dataset is a dict, not {data!r:.50}")
    for name in DATA_TEXTS:
        value = (data or {}).get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where} is damaged: dataset's {name} is no text: {value!r:.50}")


def text_of_data(source) -> ModelText:
    """ModelText of what load_tokenizer takes: a Dataset, its folder, or a meta dict."""
    meta = source if isinstance(source, dict) else getattr(source, "meta", None)
    meta = read_meta(Path(source)) if meta is None else meta
    if meta.get("tokenizer") == "model" and meta.get("text_files"):
        return text_of_files(meta["text_files"], "the data set")
    tokenizer = load_tokenizer(source)
    return ModelText(tokenizer, sampled=tokenizer.vocab_size)


def other_meaning(data, model) -> str | None:
    """What two tokenizers differ in, if ids of `data` do not mean the same to `model`; else None.

    An id means the text that it is decoded to. The model's may know more of them.
    """
    if isinstance(data, GPT2Tokenizer) and isinstance(model, GPT2Tokenizer):
        return None
    theirs, ours = data.pieces(), model.pieces()
    for i, (mine, own) in enumerate(zip(theirs, ours)):
        if mine != own:
            return f"token {i} is {mine!r} there and {own!r} to the model"
    if len(theirs) > len(ours):
        return f"token {len(ours)} is {theirs[len(ours)]!r} there and nothing to the model"
    return None


def files_to_export(text: ModelText) -> dict[str, str]:
    """The files that go beside exported weights, made where the text was a data set's own."""
    if text.files:
        return text.files
    tokenizer, settings = text.tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(tokenizer, GPT2Tokenizer):
        vocabulary, merges = gpt2_vocabulary()
        content = byte_level_bpe(
            vocabulary, read_merges(merges, "vocab.bpe"), special=[END_OF_GPT2]
        )
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_GPT2)
    elif isinstance(tokenizer, CharTokenizer | TableTokenizer):
        content = table(tokenizer.pieces())
    else:
        content = tokenizer.tokenizer.to_str()
    ends = {"eos_token_id": list(text.stop_tokens)} if text.stop_tokens else {}
    return {
        TOKENIZER: content + "\n",
        SETTINGS: json.dumps(settings, indent=1) + "\n",
        GENERATION: json.dumps(ends) + "\n",
    }
