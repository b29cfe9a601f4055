"""A toy chat model's text files, a few conversations, and the script that prepares them."""

import json
import subprocess
import sys
from pathlib import Path

import tokenizers

from leangpt.text.model_text import text_of_files

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# as Qwen3's: a thought before the last answer, none before earlier ones
THINKING = TEMPLATE.replace(
    "{% generation %}", "{% generation %}{% if loop.last %}(hm) {% endif %}", 1
)


def text_files(template=TEMPLATE):
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(
            dict(eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast")
        ),
        "chat_template.jinja": template,
        "generation_config.json": json.dumps(dict(eos_token_id=1)),
    }


def model_text(template=TEMPLATE):
    return text_of_files(text_files(template), "here")


def chat(*turns):
    return [dict(role=role, content=content) for role, content in turns]


CHATS = [
    chat(("user", "Hi"), ("assistant", "Zürich ☃")),
    chat(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "dd")),
    chat(("user", "long " * 10), ("assistant", "x")),
]


def write(path, conversations):
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations))
    return path


def prepare(tmp_path, *flags, conversations=CHATS * 4):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    for name, content in text_files().items():
        (folder / name).write_text(content)
    path = write(tmp_path / "chats.jsonl", conversations)
    return subprocess.run(
        [
            sys.executable,
            "data/prepare_chat.py",
            f"--input={path}",
            f"--model={folder}",
            "--name=mine",
            f"--data_dir={tmp_path / 'data'}",
            *flags,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
