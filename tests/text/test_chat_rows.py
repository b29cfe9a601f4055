"""Conversations as rows: the assistant's tokens alone have a loss; bad lines are named."""

import numpy as np
import pytest
import torch
from chat_files import CHATS, TEMPLATE, THINKING, model_text, prepare, text_files, write

from leangpt.system.errors import UserError
from leangpt.text.chat_rows import Counts, conversation_rows, fit_rows, padded, read_conversations
from leangpt.text.dataset import load_dataset
from leangpt.text.integrity import NO_LOSS
from leangpt.text.model_text import text_of_data

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")


def rows_of(path, text):
    counts = Counts()
    return list(conversation_rows(path, text, counts)), counts


def test_marks_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, content in text_files().items():
        (tmp_path / name).write_text(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows, counts = rows_of(write(tmp_path / "chats.jsonl", CHATS), model_text())
    assert counts.conversations == 3 and counts.split == counts.endless == 0
    for messages, (row,) in zip(CHATS, rows):
        expected = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert row.ids == expected["input_ids"]
        assert [int(a) for a in row.answered] == expected["assistant_masks"]
        assert 0 < sum(row.answered) < len(row.ids)


def test_what_is_marked_reads_as_the_answers(tmp_path):
    text = model_text(TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    rows, _ = rows_of(write(tmp_path / "chats.jsonl", CHATS), text)
    said = [
        text.tokenizer.decode([i for i, a in zip(row.ids, row.answered) if a]) for (row,) in rows
    ]
    assert said == ["Zürich ☃</s>", "b</s>dd</s>", "x</s>"]


def test_formats_that_write_earlier_turns_otherwise_make_a_row_an_answer(tmp_path):
    text = model_text(THINKING)
    rows, counts = rows_of(write(tmp_path / "chats.jsonl", CHATS), text)
    assert [len(one) for one in rows] == [1, 2, 1] and counts.split == 1
    first, second = rows[1]
    assert text.tokenizer.decode(first.ids).endswith("(hm) b</s>")
    assert "(hm) b" not in text.tokenizer.decode(second.ids)
    said = [text.tokenizer.decode([i for i, a in zip(r.ids, r.answered) if a]) for r in rows[1]]
    assert said == ["(hm) b</s>", "(hm) dd</s>"]


def test_answers_without_an_end_are_counted(tmp_path):
    text = model_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    _, counts = rows_of(write(tmp_path / "chats.jsonl", CHATS), text)
    assert counts.endless == 3


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "chats.jsonl, line 2 is not JSON"),
        ("[]", 'line 2: needs {"messages"'),
        ('{"messages": []}', "line 2: needs"),
        ('{"messages": [3]}', "line 2: message 1 needs a role"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "message 1 needs a role: system, user"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', "message 1 needs a content"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2: .* no assistant's turn"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = write(tmp_path / "chats.jsonl", CHATS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=words):
        list(read_conversations(path))


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path):
    plain = write(tmp_path / "chats.jsonl", CHATS)
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert list(read_conversations(tmp_path / "marked.jsonl")) == list(read_conversations(plain))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        list(read_conversations(tmp_path / "none.jsonl"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_conversations(tmp_path / "bytes.jsonl"))


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('no') if messages[0].content == 'a' else 'x' }}", "line 1: .*go on"),
        (
            "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}"
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "line 2: .*too many",
        ),
    ],
)
def test_a_template_that_fails_names_the_line(tmp_path, template, words):
    prompt = "{% if add_generation_prompt %}?{% endif %}" if "go on" in words else ""
    with pytest.raises(UserError, match=words):
        rows_of(write(tmp_path / "chats.jsonl", CHATS), model_text(template + prompt))


@pytest.mark.slow
def test_too_long(tmp_path):
    path, text = write(tmp_path / "chats.jsonl", CHATS), model_text()
    rows, _ = rows_of(path, text)
    answered = [[i for i, a in enumerate(row.answered) if a] for (row,) in rows]
    between = answered[1][2]  # after the first of two answers; the third's begins later
    assert len(rows[0][0].ids) < between < answered[2][0]
    for how, kept, dropped, cut in (("cut", 2, 1, 2), ("drop", 1, 2, 0), ("refuse", 3, 0, 0)):
        rows, counts = rows_of(path, text)
        left = list(fit_rows(rows, between, how, counts))
        assert len(left) == kept and (counts.dropped, counts.cut) == (dropped, cut), how
        assert counts.lines == [2, 3]
        if how == "cut":
            assert len(left[1][0].ids) == between
            assert sum(left[1][0].answered) == 2


def test_padding_has_no_loss(tmp_path):
    (rows,), _ = rows_of(write(tmp_path / "chats.jsonl", CHATS[:1]), model_text())
    numbers = padded(rows, 40, 1)
    row = rows[0]
    assert numbers.dtype == np.uint32 and len(numbers) == 40
    ids, marks = numbers & (NO_LOSS - 1), numbers >= NO_LOSS
    assert ids[: len(row.ids)].tolist() == row.ids and (ids[len(row.ids) :] == 1).all()
    assert (~marks).tolist() == row.answered + [False] * (40 - len(row.ids))


@pytest.mark.slow
def test_a_prepared_folder(tmp_path):
    done = prepare(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 conversations: 11 rows for training, 1 to validate" in done.stdout
    dataset = load_dataset("mine", tmp_path / "data")
    T = dataset.row_tokens - 1
    assert f"--dataset=mine --block_size={T}" in done.stdout and T == 69
    x, y = dataset.batch("train", 4, T, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (4, T) and int(x.max()) < dataset.vocab_size
    text = text_of_data(dataset)
    assert text.template == TEMPLATE and text.stop_tokens == (1,)
    for read, predicted in zip(x, y):
        told = text.tokenizer.decode(read.tolist())
        said = text.tokenizer.decode(predicted[predicted >= 0].tolist())
        assert told.startswith("<s>") and said in ("Zürich ☃</s>", "b</s>dd</s>", "x</s>")
        shown = predicted >= 0
        assert torch.equal(predicted[:-1][shown[:-1]], read[1:][shown[:-1]])
    assert sum(len(a) for a, _ in dataset.full_split_batches("val", T, 3)) == 1
    with pytest.raises(UserError, match="set block_size=69, not 16"):
        dataset.check_block_size(16)
    done = prepare(tmp_path, "--block_size=16")
    assert done.returncode == 2 and "conversations of up to 70 tokens" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = prepare(tmp_path, "--block_size=45", "--too_long=drop")
    assert done.returncode == 0 and "8 rows were dropped" in done.stdout
    done = prepare(tmp_path, conversations=CHATS[:1])
    assert done.returncode == 2 and "too few conversations" in done.stderr
