"""Vocabularies in other forms than tokenizer.json: what transformers or SentencePiece make of them,
or refused by name; never somebody else's."""

import json
import random
import re
import shutil
from fnmatch import fnmatch

import pytest
from sentencepiece_files import SPACE, WORDS, model_bytes, reference_bpe, toy_pieces

from leangpt.system.errors import UserError
from leangpt.text import tokenizer_json
from leangpt.text.model_text import ModelText, files_to_export, text_of_files
from leangpt.text.text_files import read_text_files, write_text_files
from leangpt.text.tokens import CharTokenizer, FileTokenizer, TableTokenizer
from leangpt.weights.chat_text import load_pretrained_text

tokenizers = pytest.importorskip("tokenizers")
SAMPLES = ["the cat", " the  hat on", "", "\n\tthen", "thé 猫🙂 mat", "<s>the</s> cat", "THAT 123"]


def bpe_folder(path, **settings):
    """vocab.json and merges.txt, as GPT-2's folder has them, and a token added later."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "t")]
    tokens = [*letters, *("".join(pair) for pair in merges), "<|endoftext|>"]
    path.mkdir(exist_ok=True)
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": len(tokens)}))
    return path


@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}], ids=str)
def test_vocab_and_merges_are_read_as_transformers_does(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    folder = bpe_folder(tmp_path, tokenizer_class="GPT2Tokenizer", **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = text_of_files(read_text_files(folder), folder)
    for sample in [*SAMPLES, "the<|im_end|>the", "at<|endoftext|>"]:
        ids = text.tokenizer.encode(sample)
        assert ids == theirs(sample).input_ids
        assert text.tokenizer.decode(ids) == theirs.decode(ids)
    assert text.special_tokens["eos_token"] == "<|endoftext|>"
    assert text.tokenizer.encode("<|im_end|>") == [261]


@pytest.mark.parametrize("kind", ["merges", "tokenizer.model", "spiece.model", "vocab.txt"])
def test_hub_downloads_fetch_every_kind_of_vocabulary(tmp_path, monkeypatch, kind):
    hub = pytest.importorskip("huggingface_hub")
    there, here = tmp_path / "there", tmp_path / "here"
    bpe_folder(there) if kind == "merges" else there.mkdir()
    if kind.endswith(".model"):
        (there / kind).write_bytes(model_bytes(toy_pieces()))
    elif kind == "vocab.txt":
        (there / kind).write_text("a\n")

    def snapshot_download(hub_id, allow_patterns):
        here.mkdir()
        for path in there.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, here)
        return str(here)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    if kind == "vocab.txt":  # nor is it taken for a folder without a vocabulary
        with pytest.raises(UserError, match="of the kind vocab.txt is not read"):
            load_pretrained_text("someone/model", text_only=True)
        return
    text = load_pretrained_text("someone/model", text_only=True)
    assert text.tokenizer.encode("the cat") == load_pretrained_text(there).tokenizer.encode(
        "the cat"
    )


def test_damaged_merges_are_named(tmp_path):
    folder = bpe_folder(tmp_path)
    (folder / "merges.txt").write_text("#version: 0.2\nt h\na b c\n")
    with pytest.raises(UserError, match="merges.txt, line 3: two tokens are merged"):
        read_text_files(folder)
    (folder / "merges.txt").write_text("q zz\n")
    with pytest.raises(
        UserError, match=f"^{re.escape(str(folder))}: its .*do not make a tokenizer"
    ):
        read_text_files(folder)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    """As editors of Windows leave it."""
    folder = bpe_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    want = read_text_files(folder)
    for path in folder.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_text_files(folder) == want


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_sentencepiece_bpe_is_that_of_sentencepiece(tmp_path, name):
    pieces = toy_pieces()
    (tmp_path / name).write_bytes(model_bytes(pieces))
    tokenizer = text_of_files(read_text_files(tmp_path), tmp_path).tokenizer
    rng = random.Random(0)
    letters = "".join(WORDS) + "  é🙂\nZ"
    for _ in range(300):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(1, 30)))
        ids = tokenizer.encode(text)
        assert ids == [1, *reference_bpe(pieces, text)], text
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.encode("<s>the", add_special_tokens=False)[0] == 1


def test_sentencepiece_settings(tmp_path):
    def tokenizer(**options):
        own = ["[INST]"] if options.pop("own", False) else []
        (tmp_path / "tokenizer.model").write_bytes(model_bytes(toy_pieces(own), **options))
        return text_of_files(read_text_files(tmp_path), tmp_path).tokenizer

    def pieces(tokenizer, text):
        return [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.encode(text)[1:]]

    assert pieces(tokenizer(), "the cat") == [SPACE + "the", SPACE + "cat"]
    assert pieces(tokenizer(dummy_prefix=0), "the cat") == ["the", SPACE + "cat"]
    assert pieces(tokenizer(remove_extra=1), "  the   cat ") == [SPACE + "the", SPACE + "cat"]
    assert pieces(tokenizer(own=True), "the[INST] cat") == [SPACE + "the", "[INST]", SPACE + "cat"]
    assert pieces(tokenizer(byte_fallback=0), "é") == [SPACE, "<unk>"]
    unigram = tokenizer(model_type=1)
    assert unigram.decode(unigram.encode("the cat sat")[1:]) == "the cat sat"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer.model", model_bytes(toy_pieces(), model_type=3), "only BPE and unigram"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tokenizer.model is not a SentencePiece model"),
        ("tokenizer.model", b"", "it has no pieces"),
        ("tokenizer.model", model_bytes(toy_pieces())[:-3], "is not a SentencePiece model"),
        ("vocab.txt", b"[PAD]\n", "vocabulary of the kind vocab.txt is not read"),
        ("tekken.json", b"{}", "tekken.json is not read"),
        ("vocab.json", b"{}", "vocab.json is not read without merges.txt: copy it there"),
        ("merges.txt", b"", "merges.txt is not read without vocab.json: copy it there"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_text_files(tmp_path)


def test_a_folder_without_any_is_empty(tmp_path):
    assert read_text_files(tmp_path) == {}


@pytest.mark.parametrize(
    "tokenizer, samples",
    [
        (CharTokenizer("\n abcé🙂"), ["ab c\né🙂", " a ", "\n\n"]),
        (TableTokenizer(["the ", "the", " cat", "t", "h", "e", "\n", " "]), ["the  cat\nhe the t"]),
    ],
    ids=["char", "table"],
)
def test_a_data_sets_own_vocabulary_goes_out_for_transformers(tmp_path, tokenizer, samples):
    transformers = pytest.importorskip("transformers")
    files = files_to_export(ModelText(tokenizer))
    write_text_files(files, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for sample in samples:
        ids = tokenizer.encode(sample)
        assert theirs(sample).input_ids == ids and theirs.decode(ids) == sample
        assert text_of_files(files, "x").tokenizer.encode(sample) == ids


def test_gpt2s_goes_out_for_transformers(tmp_path):
    from leangpt.text.tokens import GPT2Tokenizer

    transformers = pytest.importorskip("transformers")
    try:
        tokenizer = GPT2Tokenizer()
    except UserError as error:
        pytest.skip(str(error))
    write_text_files(files_to_export(ModelText(tokenizer, (50256,))), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for sample in ["Hello  world's 1234\n\n<|endoftext|>ünï", " x"]:
        assert theirs(sample).input_ids == tokenizer.encode(sample)
    assert theirs.eos_token_id == 50256


def test_gaps_and_added_tokens_count_by_their_ids():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7, "<end>": 9}))
    made.add_special_tokens(["<end>"])
    tokenizer = FileTokenizer(made.to_str(), "x")
    assert made.get_vocab_size() == 3 and tokenizer.vocab_size == 10
    assert tokenizer.encode("<end>") == [9]
    assert tokenizer.decode([0, 3, 7]) == "a b"  # an id between them is nothing


def test_a_truncation_that_a_file_carries_does_not_cut_texts():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(2)
    made.enable_padding(length=5)
    assert FileTokenizer(made.to_str(), "x").encode("a b a b") == [0, 1, 0, 1]


@pytest.mark.parametrize("cut", tokenizer_json.CUTS)
def test_every_way_of_cutting_gives_the_text_back(cut):
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(letters)}
    tokenizer = FileTokenizer(tokenizer_json.byte_level_bpe(vocabulary, [], cut), "x")
    for sample in [*SAMPLES, "a 12345 b's\r\n\r\n  x"]:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample


@pytest.mark.parametrize(
    "cut, words",
    [
        ("gpt-2", ["a", " 12345", " it", "'s", "\n", "\n", "x"]),
        ("smollm", ["a", " ", "1", "2", "3", "4", "5", " it", "'s", "\n", "\n", "x"]),
        ("llama-bpe", ["a", " ", "123", "45", " it", "'s", "\n\n", "x"]),
        ("qwen2", ["a", " ", "1", "2", "3", "4", "5", " it", "'s", "\n\n", "x"]),
    ],
)
def test_where_words_are_cut(cut, words):
    made = tokenizers.Tokenizer.from_str(tokenizer_json.byte_level_bpe({}, [], cut))
    cuts = made.pre_tokenizer.pre_tokenize_str("a 12345 it's\n\nx")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in cuts] == words
