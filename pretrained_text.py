"""The text side of a published model: tokenizer, tokens that end a text, chat format."""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from dataset import load_tokenizer
from errors import UserError
from gguf_weights import GGUFWeights, write_text_files
from pretrained import find_pretrained, open_weights, read_json


@dataclass
class PretrainedText:
    tokenizer: object  # dataset.Tokenizer: encode(str) -> list[int], decode(list[int]) -> str
    stop_tokens: tuple[int, ...] = ()  # generation ends at any of these
    template: str | None = None  # the chat format, in Jinja; None: the model has none
    special_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token

    def chat(self, messages):
        """The prompt (str) that asks the model for its next answer.

        messages: one user's text, or a list of {"role": "system"|"user"|"assistant",
        "content": str}. The template comes from a stranger, so it runs in Jinja's sandbox and
        sees these values alone. Raises UserError where there is no template, or it fails.
        """
        if self.template is None:
            raise UserError("this model has no chat format; prompt it without chat")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message):
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = raise_exception
        try:
            template = environment.from_string(self.template)
            prompt = template.render(messages=messages, add_generation_prompt=True,
                                     **self.special_tokens)
        except (TemplateError, TypeError) as error:
            raise UserError(f"the model's chat format cannot be filled in ({error})") from None
        # what the tokenizer puts in front of any text itself must not be there twice
        return prompt.removeprefix(self.tokenizer.decode(self.tokenizer.encode("")))


def load_pretrained_text(name_or_dir):
    """PretrainedText of a model named as for pretrained.load_pretrained.

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


def _read_folder(folder):
    def read(name):
        return read_json(folder / name) if (folder / name).exists() else {}

    settings = read("tokenizer_config.json")
    ends = read("generation_config.json").get("eos_token_id")
    if ends is None:
        ends = read("config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    special = {name: settings[name] for name in ("bos_token", "eos_token") if settings.get(name)}
    special = {name: token["content"] if isinstance(token, dict) else token
               for name, token in special.items()}
    file = (folder / "tokenizer.json").resolve()
    tokenizer = load_tokenizer({"tokenizer": "file", "path": str(file)})
    return PretrainedText(tokenizer, tuple(ends), _template(folder, settings), special)


def _template(folder, settings):
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name: [{"name": ..., "template": ...}]
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template
