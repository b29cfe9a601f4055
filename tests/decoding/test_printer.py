"""A streamed text is the whole text, for every kind of tokenizer, whatever tokens come."""

import random

import pytest
from sentencepiece_files import model_bytes, toy_pieces

from leangpt.decoding.printer import Printer, until_stop
from leangpt.system.errors import UserError
from leangpt.text import sentencepiece, tokenizer_json
from leangpt.text.tokens import CharTokenizer, FileTokenizer, GPT2Tokenizer, TableTokenizer

tokenizers = pytest.importorskip("tokenizers")


def byte_level():
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *letters, "Ġt", "he", "Ġthe"])}
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    return FileTokenizer(tokenizer_json.byte_level_bpe(vocabulary, merges, special=["<end>"]), "x")


def of_sentencepiece(**options):
    legacy = options.pop("legacy", True)
    pieces = sentencepiece.read_model(model_bytes(toy_pieces(), **options), "x")
    return FileTokenizer(sentencepiece.tokenizer_json(pieces, legacy), "x")


def metaspace():
    vocabulary = [("<unk>", 0.0), ("\u2581", -1.0), ("\u2581a", -2.0), ("b", -3.0), ("!", -3.0)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 0))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    return FileTokenizer(made.to_str(), "x")


def words():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"to": 0, "be": 1, "or": 2}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return FileTokenizer(made.to_str(), "x")


def gpt2():
    try:
        return GPT2Tokenizer()
    except UserError as error:
        pytest.skip(str(error))


KINDS = {
    "char": lambda: CharTokenizer("\n abcé🙂"),
    "table": lambda: TableTokenizer(["the ", "cat", " ", "\n"]),
    "gpt2": gpt2,
    "byte-level": byte_level,
    "sentencepiece": of_sentencepiece,
    "sentencepiece-first": lambda: of_sentencepiece(legacy=False),
    "sentencepiece-bare": lambda: of_sentencepiece(dummy_prefix=0),
    "unigram": lambda: of_sentencepiece(model_type=1),
    "metaspace": metaspace,
    "words": words,
}


def streamed(capsys, tokenizer, prompt, new, show_prompt, stops=()):
    printer = Printer(tokenizer, stops, prompt, show_prompt)
    for token in new:
        printer([token])
    printer.end()
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_prints_the_whole_text(kind, capsys):
    tokenizer, rng = KINDS[kind](), random.Random(0)
    size = tokenizer.vocab_size
    # ids of single bytes most of the time, where there are any: characters in pieces
    low = range(min(size, 260))
    for trial in range(150):
        tokens = [
            rng.choice(low) if rng.random() < 0.5 else rng.randrange(size)
            for _ in range(rng.randrange(2, 40))
        ]
        cut = rng.randrange(1, len(tokens))
        prompt, new = tokens[:cut], tokens[cut:]
        whole = tokenizer.decode(tokens) + "\n"
        assert streamed(capsys, tokenizer, prompt, new, True) == whole, (trial, tokens)
        answer = tokenizer.decode(new) + "\n"
        assert streamed(capsys, tokenizer, prompt, new, False) == answer, (trial, new)


@pytest.mark.parametrize("kind", ["gpt2", "byte-level", "sentencepiece"])
def test_texts_come_character_by_character(kind, capsys):
    tokenizer = KINDS[kind]()
    text = "the cat 猫🙂 sat\n\n  the é"
    ids = tokenizer.encode(text)
    printer, seen = Printer(tokenizer, (), [], True), ""
    for token in ids:
        printer([token])
        seen += capsys.readouterr().out
        assert text.startswith(seen) or tokenizer.decode(ids).startswith(seen)
        assert "\ufffd" not in seen
    assert len(text) - len(seen) <= 1  # a byte token's character waits for the next token
    printer.end()
    assert seen + capsys.readouterr().out == text + "\n"


def test_a_space_between_prompt_and_answer_stays(capsys):
    tokenizer = of_sentencepiece()
    prompt, new = tokenizer.encode("the cat"), tokenizer.encode("sat on")
    assert streamed(capsys, tokenizer, prompt, new, True) == "the cat sat on\n"


def test_long_texts_are_not_decoded_again_and_again():
    lengths = []

    class Counting:
        def decode(self, ids):
            lengths.append(len(ids))
            return "".join(chr(97 + i % 26) for i in ids)

    printer = Printer(Counting(), (), list(range(100)), True)
    printer.show = lambda text: None
    for token in range(200):
        printer([token])
    assert max(lengths[2:]) <= 12


def test_stop_tokens_end_it(capsys):
    tokenizer = CharTokenizer("abc")
    assert streamed(capsys, tokenizer, [0], [1, 2, 1], True, stops=(2,)) == "abb\n"
    assert until_stop([0, 2, 1, 2, 1], 2, (2,)) == [0, 2, 1]
