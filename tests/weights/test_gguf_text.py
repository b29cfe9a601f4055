"""What a GGUF file's metadata say of its text: they count, whatever files lie beside them."""

import json

import pytest
from sentencepiece_files import reference_bpe, toy_pieces
from test_gguf import gguf_llama, toy_vocabulary

from leangpt.system.errors import UserError
from leangpt.text.model_text import files_to_export
from leangpt.text.text_files import write_text_files
from leangpt.weights.chat_text import load_pretrained_text
from leangpt.weights.gguf_text import PREFIX, gguf_text_files

tokenizers = pytest.importorskip("tokenizers")


def text_of(tmp_path, changes=None, drop=()):
    metadata = {**toy_vocabulary(), **(changes or {})}
    for name in drop:
        del metadata[PREFIX + name]
    return load_pretrained_text(gguf_llama(tmp_path / "tiny.gguf", changes=metadata))


def test_byte_level_vocabulary(tmp_path):
    text, tokens = text_of(tmp_path), toy_vocabulary()["tokenizer.ggml.tokens"]
    ids = text.tokenizer.encode("he he 42<|im_end|>ünï")
    assert [tokens[i] for i in ids[:7]] == ["he", "Ġhe", "Ġ", "4", "2", "<|im_end|>", "Ã"]
    assert text.tokenizer.decode(ids) == "he he 42<|im_end|>ünï" and text.notes == []


def test_a_missing_pre_is_said(tmp_path):
    text = text_of(tmp_path, drop=["pre"])
    assert "has no tokenizer.ggml.pre" in text.notes[0]
    assert text.tokenizer.encode("42") == text_of(tmp_path).tokenizer.encode("42")


def test_unknown_tokenizers_are_named(tmp_path):
    with pytest.raises(UserError, match="'bert'.*tokenizer.json"):
        text_of(tmp_path, {PREFIX + "model": "bert"})
    with pytest.raises(UserError, match="deepseek"):
        text_of(tmp_path, {PREFIX + "pre": "deepseek-llm"})
    with pytest.raises(UserError, match="tiny.gguf has no tokenizer.ggml.tokens"):
        text_of(tmp_path, drop=["tokens"])
    with pytest.raises(UserError, match="tiny.gguf: its vocabulary and merges do not make"):
        text_of(tmp_path, {PREFIX + "merges": ["q zz"]})


def test_sentencepiece_vocabulary(tmp_path):
    pieces = toy_pieces()
    texts, scores, types = (list(column) for column in zip(*pieces))
    metadata = {
        PREFIX + "model": "llama",
        PREFIX + "tokens": texts,
        PREFIX + "scores": scores,
        PREFIX + "token_type": types,
        PREFIX + "bos_token_id": 1,
        PREFIX + "eos_token_id": 2,
    }
    for said, begins in ((None, True), (False, False), (True, True)):
        extra = {} if said is None else {PREFIX + "add_bos_token": said}
        text = load_pretrained_text(gguf_llama(tmp_path / "spm.gguf", changes=metadata | extra))
        ids = text.tokenizer.encode("the cat é")
        assert ids == [1] * begins + reference_bpe(pieces, "the cat é")
        assert text.stop_tokens == (2,) and text.special_tokens["bos_token"] == "<s>"


ENDS = [
    ({"eos_token_id": 1}, (1,)),
    ({"eos_token_id": 1, "eot_token_id": 0, "eom_token_id": 5}, (1, 0, 5)),
    ({"eos_token_id": [1, 7]}, (1, 7)),
    ({"eos_token_id": 1, "eot_token_ids": [0, 1]}, (1, 0)),
    ({"eot_token_id": 0}, (0,)),
    ({}, (3,)),  # what lies beside
]


@pytest.mark.parametrize("said, ends", ENDS, ids=lambda x: str(x))
def test_stop_tokens_beside_other_files(tmp_path, said, ends):
    write_text_files(files_to_export(text_of(tmp_path)), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    text = text_of(tmp_path, {PREFIX + name: value for name, value in said.items()})
    assert text.stop_tokens == ends


def test_template_and_beginning_beside_other_files(tmp_path):
    begin = {"bos_token": "<|im_start|>", "chat_template": "of the folder"}
    write_text_files(files_to_export(text_of(tmp_path)), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(begin))
    (tmp_path / "chat_template.jinja").write_text("also of the folder")
    assert text_of(tmp_path).chat("x") == "also of the folder"
    said = {"tokenizer.chat_template": "the model's", PREFIX + "bos_token_id": 1}
    text = text_of(tmp_path, said)
    assert text.chat("x") == "the model's" and text.special_tokens["bos_token"] == "<|im_end|>"
    plain = text.tokenizer.encode("he")
    assert text_of(tmp_path, said | {PREFIX + "add_bos_token": True}).tokenizer.encode("he") == [
        1,
        *plain,
    ]
    assert (
        text_of(tmp_path, said | {PREFIX + "add_bos_token": False}).tokenizer.encode("he") == plain
    )


def test_metadata_of_other_types_are_one_line():
    for name in ("tokens", "merges", "token_type"):
        metadata = {**toy_vocabulary(), PREFIX + name: 3}
        with pytest.raises(UserError, match="x.gguf"):
            gguf_text_files(metadata, "x.gguf")


def test_what_goes_out_is_what_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    said = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        PREFIX + "bos_token_id": 0,
        PREFIX + "eos_token_id": 1,
        PREFIX + "add_bos_token": True,
    }
    text = text_of(tmp_path, said)
    write_text_files(files_to_export(text), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for sample in ("he he 42<|im_end|>ünï", " he"):
        assert theirs(sample).input_ids == text.tokenizer.encode(sample)
    chat = [{"role": "user", "content": "he"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == text.chat(chat) == "<|im_start|>he"
    assert theirs.eos_token_id == 1
