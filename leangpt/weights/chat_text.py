"""The text side of a published model: tokenizer, tokens that end a text, chat format."""

import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from leangpt.system.errors import UserError
from leangpt.system.reading import read_json, regular_file
from leangpt.text.tokens import load_tokenizer
from leangpt.weights.chat_template import render_alone
from leangpt.weights.find import find_pretrained, open_weights
from leangpt.weights.gguf import GGUFWeights, write_text_files

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass
class PretrainedText:
    """A published model's words: its tokenizer, where its answers end, its chat format."""

    tokenizer: object  # text.tokens: encode(str) -> list[int], decode(list[int]) -> str
    stop_tokens: tuple[int, ...] = ()  # generation ends at any of these
    template: str | None = None  # the chat format, in Jinja; None: the model has none
    special_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token

    def chat(self, messages):
        """The prompt (str) that asks the model for its next answer.

        messages: one user's text, or a list of {"role": "system"|"user"|"assistant",
        "content": str}. The template comes from a stranger, so it runs in Jinja's sandbox, in a
        process that sees these values alone and is given little time and memory. Raises UserError
        where there is no template, or it fails.
        """
        if self.template is None:
            raise UserError("this model has no chat format; prompt it without chat")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if find_spec("jinja2") is None:
            raise UserError("chat formats need jinja2: pip install jinja2")
        values = dict(messages=messages, add_generation_prompt=True, **self.special_tokens)
        try:
            prompt = render_alone(self.template, values)
        except ValueError as error:
            raise UserError(f"the model's chat format cannot be filled in ({error})") from None
        # what the tokenizer puts in front of any text itself must not be there twice
        return prompt.removeprefix(self.tokenizer.decode(self.tokenizer.encode("")))


def load_pretrained_text(name_or_dir):
    """PretrainedText of a model named as for load_pretrained.

    Read from the folder's tokenizer.json, generation_config.json and chat template; a GGUF file
    without a tokenizer.json beside it brings its own; GPT-2's vocabulary needs no file at all.
    Raises UserError where there is no tokenizer, or a file is damaged.
    """
    path = find_pretrained(name_or_dir)
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").exists():
        return _read_folder(folder)
    weights = open_weights(path)
    if isinstance(weights, GGUFWeights):
        with TemporaryDirectory() as temporary:
            write_text_files(weights.metadata, temporary, weights.path)
            return _read_folder(Path(temporary))
    if weights.settings["vocab_size"] == 50257:  # GPT-2's, which tiktoken knows
        return PretrainedText(load_tokenizer({"tokenizer": "gpt2"}), (50256,))
    raise UserError(f"{folder} has no tokenizer.json: copy the model's own into it")


def copy_text_files(name_or_dir, folder):
    """Put the tokenizer's files of a published model, named as above, into a folder.

    A GGUF file's own are written out; a model without any (GPT-2 from safetensors alone) has none.
    """
    path = find_pretrained(name_or_dir)
    source, folder = path if path.is_dir() else path.parent, Path(folder)
    if not (source / "tokenizer.json").exists():
        weights = open_weights(path)
        if isinstance(weights, GGUFWeights):
            write_text_files(weights.metadata, folder, weights.path)
        return
    for name in TEXT_FILES:
        if (source / name).exists() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


def _read_folder(folder):
    def read(name):
        return read_json(folder / name) if (folder / name).exists() else {}

    settings = read("tokenizer_config.json")
    ends = read("generation_config.json").get("eos_token_id")
    if ends is None:
        ends = read("config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in ends):
        raise UserError(f"{folder}: eos_token_id must be a token's number or a list, not {ends}")
    special = {}
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise UserError(f"{folder}/tokenizer_config.json: {name} must be a text, not {token!r}")
        if token:
            special[name] = token
    file = (folder / "tokenizer.json").resolve()
    tokenizer = load_tokenizer({"tokenizer": "file", "path": str(file)})
    return PretrainedText(tokenizer, tuple(ends), _template(folder, settings), special)


def _template(folder, settings):
    if (folder / "chat_template.jinja").exists():
        try:
            return regular_file(folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder}/chat_template.jinja cannot be read ({error})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name: [{"name": ..., "template": ...}]
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in entries}.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder}/tokenizer_config.json: chat_template must be a text")
    return template
