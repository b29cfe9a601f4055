"""Token files, batches and tokenizers."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from leangpt.system.errors import UserError
from leangpt.text import folder as folder_module
from leangpt.text.dataset import Dataset, describe, load_dataset
from leangpt.text.folder import check_vocab_size, write_dataset
from leangpt.text.tokens import load_tokenizer

CHARACTERS = "\nabcde"


@pytest.fixture
def prepared(tmp_path):
    """A char dataset whose train split counts 0..5 over and over, 100 tokens, and val 23."""
    meta = {
        "tokenizer": "char",
        "vocab_size": 6,
        "characters": CHARACTERS,
        "source": "counting",
        "sha256": "0123456789abcdef",
    }
    write_dataset(tmp_path / "count", np.arange(100) % 6, np.arange(23) % 6, meta)
    return tmp_path


def test_round_trip(prepared):
    dataset = load_dataset("count", prepared)
    assert isinstance(dataset, Dataset) and dataset.train.dtype == np.uint16
    assert dataset.train.tolist() == [i % 6 for i in range(100)] and len(dataset.val) == 23
    assert (dataset.vocab_size, dataset.source) == (6, "counting")
    assert dataset.sha256 == "0123456789abcdef"
    assert dataset.meta["train_tokens"] == 100 and dataset.meta["val_tokens"] == 23
    assert describe(dataset) == (
        "count: 100 train and 23 val tokens, vocabulary 6, from counting, sha256 0123456789ab"
    )
    names = sorted(path.name for path in (prepared / "count").iterdir())
    assert names == ["meta.json", "meta.pkl", "train.bin", "val.bin"]


def test_files_are_what_nanogpt_reads(prepared):
    with open(prepared / "count/meta.pkl", "rb") as file:
        meta = pickle.load(file)
    assert meta["vocab_size"] == 6 and meta["stoi"]["c"] == 3 and meta["itos"][3] == "c"
    raw = np.memmap(prepared / "count/train.bin", dtype=np.uint16, mode="r")
    assert raw[:7].tolist() == [0, 1, 2, 3, 4, 5, 0]


def test_batches_are_shifted_windows(prepared):
    dataset = load_dataset("count", prepared)
    x, y = dataset.batch("train", 32, 10, torch.Generator().manual_seed(1))
    assert x.shape == y.shape == (32, 10) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, (x + 1) % 6)
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_batches_reach_both_ends(prepared):
    dataset = load_dataset("count", prepared)
    tokens = np.arange(100, dtype=np.uint16)  # unique ids: a window tells where it starts
    dataset = Dataset("unique", dataset.directory, tokens, tokens, dataset.meta)
    x, y = dataset.batch("train", 5000, 10, torch.Generator().manual_seed(1))
    assert x[:, 0].unique().tolist() == list(range(90)) and y.max() == 99


def test_order_depends_on_the_generator_alone(prepared):
    dataset = load_dataset("count", prepared)
    first, second = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    a = [dataset.batch("train", 4, 8, first)[0] for _ in range(3)]
    torch.manual_seed(99)  # neither the global generator nor an evaluation between disturbs it
    b = []
    for _ in range(3):
        list(dataset.full_split_batches("val", 8, 2))
        dataset.batch("val", 4, 8, torch.Generator().manual_seed(0))
        b.append(dataset.batch("train", 4, 8, second)[0])
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_full_split_covers_it_once_in_order(prepared):
    dataset = load_dataset("count", prepared)
    batches = list(dataset.full_split_batches("val", 4, 2))
    assert [tuple(x.shape) for x, _ in batches] == [(2, 4), (2, 4), (1, 4)]  # (23 - 1) // 4 blocks
    x, y = (torch.cat([batch[i] for batch in batches]).flatten().tolist() for i in (0, 1))
    assert x == dataset.val[:20].tolist() and y == dataset.val[1:21].tolist()


def spoil_missing(folder):
    (folder / "val.bin").unlink()


def spoil_truncated(folder):
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:50])


def spoil_odd(folder):
    (folder / "train.bin").write_bytes(b"123")


def spoil_ids(folder):
    (folder / "val.bin").write_bytes(np.full(23, 6, np.uint16).tobytes())


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text()) | changes
    (folder / "meta.json").write_text(json.dumps(meta))


def spoil_unhashed_ids(folder):
    spoil_ids(folder)
    edit_meta(folder, files={})


def spoil_last_id(folder):
    """Beyond the first million, where a look at the beginning would not see it."""
    many = np.zeros(1_500_000, np.uint16)
    many[-1] = 65535
    (folder / "train.bin").write_bytes(many.tobytes())
    edit_meta(folder, files={}, train_tokens=len(many))


def spoil_one_bit(folder):
    damaged = bytearray((folder / "train.bin").read_bytes())
    damaged[60] ^= 1
    (folder / "train.bin").write_bytes(damaged)


def spoil_types(folder):
    edit_meta(folder, train_tokens="many")


def spoil_files(folder):
    edit_meta(folder, files={"val.bin": 7})


def spoil_mark(folder):
    (folder / "INCOMPLETE").touch()


def spoil_json(folder):
    (folder / "meta.json").write_text("{")


def spoil_fields(folder):
    (folder / "meta.json").write_text("{}")


def spoil_vocabulary(folder):
    meta = json.loads((folder / "meta.json").read_text()) | {"vocab_size": 70000}
    (folder / "meta.json").write_text(json.dumps(meta))


def spoil_pickle(folder):
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(b"nonsense")


def spoil_pickle_with_code(folder):
    class Harmful:
        def __reduce__(self):
            return print, ("this must not be printed",)

    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps(Harmful()))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (spoil_missing, ["val.bin is missing", "prepare_text.py", "--name count"]),
        (spoil_truncated, ["25 tokens", "meta.json says 100"]),
        (spoil_odd, ["odd number of bytes"]),
        (spoil_ids, ["val.bin is not what was prepared", "sha256"]),
        (spoil_unhashed_ids, ["token 6", "vocabulary has 6"]),
        (spoil_last_id, ["token 65535", "vocabulary has 6"]),
        (spoil_one_bit, ["train.bin is not what was prepared"]),
        (spoil_types, ["train_tokens is 'many'"]),
        (spoil_files, ["the entry of val.bin"]),
        (spoil_mark, ["is being prepared", "interrupted"]),
        (spoil_json, ["not JSON"]),
        (spoil_fields, ["lacks vocab_size"]),
        (spoil_vocabulary, ["70000", "uint16"]),
        (spoil_pickle, ["meta.pkl is not"]),
        (spoil_pickle_with_code, ["meta.pkl is not", "print"]),
    ],
)
def test_spoiled_folders_are_refused(prepared, spoil, words, capsys):
    spoil(prepared / "count")
    with pytest.raises(UserError) as error:
        load_dataset("count", prepared)
    assert all(word in str(error.value) for word in words), error.value
    assert capsys.readouterr().out == ""


def test_missing_data_names_the_prepare_script(tmp_path):
    (tmp_path / "plays").mkdir()
    (tmp_path / "plays/prepare.py").write_text("")
    with pytest.raises(UserError, match=r"run  python .*plays/prepare\.py"):
        load_dataset("plays", tmp_path)


def test_too_short_for_block_size(prepared):
    dataset = load_dataset("count", prepared)
    dataset.batch("val", 1, 22)
    for call in (
        lambda: dataset.batch("val", 1, 23),
        lambda: list(dataset.full_split_batches("val", 23, 1)),
    ):
        with pytest.raises(UserError, match="val split of count has 23 tokens.*block_size=23"):
            call()
    with pytest.raises(UserError, match="unknown split"):
        dataset.batch("test", 1, 4)


def test_nanogpt_folders_load(prepared):
    (prepared / "count/meta.json").unlink()
    dataset = load_dataset("count", prepared)
    assert dataset.vocab_size == 6 and dataset.meta["characters"] == CHARACTERS
    assert load_tokenizer(dataset).encode("cab") == [3, 1, 2]
    (prepared / "count/meta.pkl").unlink()
    dataset = load_dataset("count", prepared)
    assert dataset.vocab_size == 50257 and dataset.meta["tokenizer"] == "gpt2"


def test_write_refuses_and_leaves_the_old(prepared):
    meta = {"tokenizer": "char", "vocab_size": 6, "characters": CHARACTERS}
    before = {path: path.read_bytes() for path in (prepared / "count").iterdir()}
    for train, extra in (([0], {}), ([0, 1], {"vocab_size": 2**31})):
        with pytest.raises(UserError):
            write_dataset(prepared / "count", train, [0, 1], meta | extra)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        write_dataset(prepared / "count", [0, 6], [0, 1], meta)
    assert before == {path: path.read_bytes() for path in (prepared / "count").iterdir()}


def test_largest_vocabulary(tmp_path):
    check_vocab_size(65535)
    for size in (65536, 0, -1, "65"):
        with pytest.raises(UserError, match="uint16"):
            check_vocab_size(size)
    write_dataset(tmp_path / "big", [0, 65534], [1, 2], {"tokenizer": "gpt2", "vocab_size": 65535})
    assert load_dataset("big", tmp_path).train.tolist() == [0, 65534]


def test_char_tokenizer(prepared):
    tokenizer = load_tokenizer(prepared / "count")
    assert tokenizer.vocab_size == 6 and tokenizer.encode("ab\n") == [1, 2, 0]
    assert tokenizer.decode([1, 2, 0]) == "ab\n" and tokenizer.decode([1, 99]) == "a\ufffd"
    with pytest.raises(UserError) as error:
        tokenizer.encode("abzé")
    assert "'z' 'é'" in str(error.value)


def test_file_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"to": 0, "be": 1, "[UNK]": 2}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "meta.json").write_text(
        json.dumps({"tokenizer": "file", "path": "tokenizer.json", "vocab_size": 3})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("to be or") == [0, 1, 2] and tokenizer.vocab_size == 3
    assert tokenizer.decode([0, 1]) == "to be"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "meta, words",
    [
        ({"tokenizer": "words"}, "unknown tokenizer 'words'"),
        ({}, "unknown tokenizer None"),
        ({"tokenizer": "char"}, "gives no 'characters'"),
        ({"tokenizer": "file"}, "gives no 'path'"),
        ("no_such_folder", "no prepared dataset in no_such_folder"),
    ],
)
def test_bad_tokenizers_are_named(meta, words):
    with pytest.raises(UserError, match=words):
        load_tokenizer(meta)


class Killed(BaseException):
    """Ends a prepare where it stands, as SIGKILL would: nothing is tidied up."""


def test_wherever_a_prepare_is_killed_no_mixed_data_is_read(prepared, monkeypatch):
    """Before each of its writes and removals in turn: what is read then is old and whole, new and
    whole, or refused."""
    folder = prepared / "count"
    old = [(folder / f"{split}.bin").read_bytes() for split in ("train", "val")]
    meta = {"tokenizer": "char", "vocab_size": 6, "characters": CHARACTERS, "source": "again"}
    real = {"write_whole": folder_module.write_whole, "unlink": Path.unlink}
    new, outcomes = None, []
    for killed_at in range(40):
        calls = [0]

        def counted(name, calls=calls, killed_at=killed_at):
            def call(*args, **kwargs):
                calls[0] += 1
                if calls[0] > killed_at:
                    raise Killed
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(folder_module, "write_whole", counted("write_whole"))
            patch.setattr(Path, "unlink", counted("unlink"))
            try:
                write_dataset(folder, np.arange(120) % 5, np.arange(30) % 5, meta)
                new = True
            except Killed:
                pass
        try:
            found = load_dataset("count", prepared)
            outcomes.append("new" if len(found.train) == 120 and len(found.val) == 30 else "old")
            if outcomes[-1] == "old":
                assert [found.train.tobytes(), found.val.tobytes()] == old
        except UserError as error:
            assert "interrupted" in str(error)
            outcomes.append("refused")
        if new:
            break
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)
    assert {"old", "new"} < set(outcomes) and outcomes.count("refused") > 5


def test_a_large_file_is_checked_beside_the_run(prepared, monkeypatch):
    monkeypatch.setattr("leangpt.text.integrity.AT_ONCE", 0)
    spoil_one_bit(prepared / "count")
    dataset = load_dataset("count", prepared)  # goes on
    with pytest.raises(UserError, match="train.bin is not what was prepared"):
        for check in dataset.checks:
            check.wait()
    with pytest.raises(UserError, match="train.bin is not what was prepared"):
        dataset.batch("train", 1, 8)


def test_a_vocabulary_of_words_decodes_by_its_own_table(prepared):
    folder = prepared / "count"
    (folder / "meta.json").unlink()
    words = ["the ", "cat ", "sat ", "on ", "a ", "mat"]
    pickled = {"vocab_size": 6, "itos": dict(enumerate(words))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(pickled))
    tokenizer = load_tokenizer(load_dataset("count", prepared))
    assert tokenizer.decode([0, 1, 2, 9]) == "the cat sat \ufffd"
    assert tokenizer.encode("the cat sat on a mat") == [0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="begins 'dog'"):
        tokenizer.encode("the dog")


def test_one_process_of_a_machine_reads_large_files(prepared, monkeypatch):
    monkeypatch.setattr("leangpt.text.integrity.AT_ONCE", 0)
    spoil_one_bit(prepared / "count")
    assert load_dataset("count", prepared, read_large=False).checked(5)
    with pytest.raises(UserError, match="train.bin is not what was prepared"):
        load_dataset("count", prepared).checked(5)
