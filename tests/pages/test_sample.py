"""sample.py on small checkpoints: same text however it decodes, and one clear line for mistakes."""

import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attention_policies
import sample
from leangpt.system.errors import UserError
from model import GPT, GPTConfig

ROOT = Path(sample.__file__).parent
CHARACTERS = "\n !'abcdefghijklmnopqrstuvwxyzé"

DATA = {"tokenizer": "char", "characters": CHARACTERS, "vocab_size": len(CHARACTERS)}


def save(folder, dataset=None, **options):
    torch.manual_seed(0)
    settings = dict(block_size=32, vocab_size=len(CHARACTERS), n_layer=2, n_head=4, n_embd=64)
    model = GPT(GPTConfig(**(settings | options)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    folder.mkdir()
    checkpoint = {
        "model": model.state_dict(),
        "model_args": asdict(model.config),
        "iter_num": 5,
        "best_val_loss": 1.0,
        "config": {"dataset": "tiny"},
        "optimizer": {},
    }
    if dataset is not None:
        checkpoint["dataset"] = dataset
    torch.save(checkpoint, folder / "ckpt.pt")
    return folder


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("runs") / "out", DATA)


def run(capsys, out_dir, *flags):
    """(the texts, the first line, the last line) of one run."""
    sample.main(
        [
            f"--out_dir={out_dir}",
            "--device=cpu",
            "--max_new_tokens=40",
            "--start=hello",
            "--num_samples=2",
            *flags,
        ]
    )
    out = capsys.readouterr().out
    first, _, rest = out.partition("; cpu (asked for)\n")
    body, _, last = rest.strip().rpartition("\n")
    texts = body.split("\n" + sample.RULE)
    return [text.removeprefix("\n") for text in texts[:-1]], first, last


def test_writes_num_samples_texts_that_start_with_the_prompt(capsys, out_dir):
    texts, first, last = run(capsys, out_dir)
    assert len(texts) == 2 and texts[0] != texts[1]
    assert all(text.startswith("hello") and len(text) == 45 for text in texts)
    assert first.startswith("model: 0.1M parameters in float32; attention policy cache")
    assert "tokens/s" in last and "GB/s" in last


def test_the_same_seed_gives_the_same_text_under_every_policy(capsys, out_dir):
    want, *_ = run(capsys, out_dir)
    for flags in (
        ["--attention_policy=recompute"],
        ["--attention_policy=cache", "--kv_bits=8"],
        ["--top_p=1.0"],
    ):
        got, *_ = run(capsys, out_dir, *flags)
        # rounding K and V may turn a word in the end: a character model has close calls
        assert [t[:25] for t in got] == [t[:25] for t in want]
        assert "--kv_bits=8" in flags or got == want
    other, *_ = run(capsys, out_dir, "--seed=2")
    assert other != want


def test_a_prompt_typed_where_the_terminal_says_ascii(capsys, out_dir):
    want, *_ = run(capsys, out_dir, "--start=caf\xe9")
    got, *_ = run(capsys, out_dir, "--start=caf\udcc3\udca9")
    assert got == want and got[0].startswith("café")


def test_a_model_of_few_positions(capsys, tmp_path):
    out = save(tmp_path / "out", DATA, block_size=4)
    texts, *_ = run(capsys, out, "--start=he")
    assert all(len(text) == 42 for text in texts)


def test_a_prompt_from_a_pipe(capsys, out_dir, tmp_path):
    want, *_ = run(capsys, out_dir)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["hello"])
    writer.start()
    got, *_ = run(capsys, out_dir, f"--start=FILE:{tmp_path / 'pipe'}")
    writer.join()
    assert got == want


def test_tiles_asked_for_read_the_prompt_and_change_no_text(capsys, out_dir, tmp_path, monkeypatch):
    tiles, run_tiles = [], attention_policies.run_tiles
    monkeypatch.setattr(
        attention_policies,
        "run_tiles",
        lambda b, x, s, **k: tiles.append(s) or run_tiles(b, x, s, **k),
    )
    want, *_ = run(capsys, out_dir)
    assert not tiles
    seeds = ["--policy", "recompute", "--k-chunk", "2", "--q-chunk", "3", "--kv-heads", "4"]
    got, *_ = run(capsys, out_dir, *seeds)
    assert got == want and set(tiles) == {(3, 2)}
    mixed = save(tmp_path / "mixed", DATA, checkpoint_layers=True, checkpoint_first=1)
    tiles.clear()
    got, *_ = run(capsys, mixed, "--q_chunk=3")
    assert got == want and set(tiles) == {(3, 3)}


def test_streaming_prints_the_same_characters(capsys, out_dir):
    one, *_ = run(capsys, out_dir, "--num_samples=1")
    streamed, *_ = run(capsys, out_dir, "--num_samples=1", "--stream=True")
    assert streamed == one
    two, *_ = run(capsys, out_dir, "--stream=True")
    assert len(two) == 2 and two[0] == one[0] and two[1] != two[0]


def test_greedy_ignores_the_seed(capsys, out_dir):
    a, *_ = run(capsys, out_dir, "--temperature=0", "--seed=1")
    b, *_ = run(capsys, out_dir, "--temperature=0", "--seed=2")
    assert a == b and a[0] == a[1]


def test_prompt_from_a_file(capsys, out_dir, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("hello", encoding="utf-8")
    want, *_ = run(capsys, out_dir)
    got, *_ = run(capsys, out_dir, f"--start=FILE:{path}")
    assert got == want


def test_a_byte_order_mark_is_no_part_of_a_prompt(capsys, out_dir, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    want, *_ = run(capsys, out_dir)
    got, *_ = run(capsys, out_dir, f"--start=FILE:{path}")
    assert got == want


def test_the_default_prompt_where_the_vocabulary_lacks_it(capsys, tmp_path):
    meta = {"tokenizer": "char", "characters": "bca", "vocab_size": 3}
    out = save(tmp_path / "out", meta, vocab_size=3)
    flags = [f"--out_dir={out}", "--device=cpu", "--max_new_tokens=5", "--num_samples=1"]
    sample.main(flags)
    said = capsys.readouterr().out
    assert "note: the vocabulary lacks '\\n': the text begins with 'b'" in said
    assert said.splitlines()[2][0] == "b"
    with pytest.raises(UserError, match="lacks '.n'"):  # asked for, it is an error
        sample.main([*flags, "--start=\n"])


def test_four_bits_saved_and_loaded(capsys, out_dir, tmp_path):
    path = tmp_path / "model.safetensors"
    texts, first, _ = run(capsys, out_dir, "--int4=True", f"--save_int4={path}", "--group_size=64")
    assert "rounded to 4.5 bits per weight" in first and "4-bit layers of 4.5 bits" in first
    assert "model: 0.1M parameters in bfloat16" in first
    again, first, _ = run(capsys, tmp_path, f"--init_from={path}")
    assert again == texts and "4-bit layers of 4.5 bits" in first


def test_a_checkpoint_of_nanogpt_finds_its_data_set(capsys, tmp_path):
    from leangpt.text.folder import write_dataset

    meta = {
        "tokenizer": "char",
        "characters": CHARACTERS,
        "vocab_size": len(CHARACTERS),
        "source": "a test",
    }
    write_dataset(tmp_path / "data" / "tiny", [1, 2, 3], [1, 2, 3], meta)
    out = save(tmp_path / "out")
    texts, *_ = run(capsys, out, f"--data_dir={tmp_path / 'data'}")
    assert texts[0].startswith("hello")
    with pytest.raises(UserError, match="no prepared dataset"):
        run(capsys, out, f"--data_dir={tmp_path / 'nowhere'}")


@pytest.mark.slow
def test_published_weights_export_and_back(capsys, tmp_path):
    """A GPT-2 checkpoint goes out as a transformers folder and comes back as init_from."""
    out = save(
        tmp_path / "out",
        {"tokenizer": "gpt2", "vocab_size": 50257},
        vocab_size=50257,
        n_embd=32,
        bias=True,
    )
    want, *_ = run(capsys, out, "--num_samples=1")
    folder = tmp_path / "folder"
    sample.main([f"--out_dir={out}", f"--export={folder}"])
    said = capsys.readouterr().out
    assert "exported" in said
    got, *_ = run(capsys, out, "--num_samples=1", f"--init_from={folder}")
    assert got == want
    streamed, *_ = run(capsys, out, "--num_samples=1", "--stream=True")
    assert streamed == want


def test_an_export_says_which_settings_mean_nothing(capsys, out_dir, tmp_path):
    flags = [f"--out_dir={out_dir}", f"--export={tmp_path / 'x'}", "--top_k=3", "--start=hello"]
    sample.main(flags)
    said = capsys.readouterr().out
    assert "note: nothing is sampled, so start, top_k mean nothing here" in said


MISTAKES = [
    (["--start="], "--start is empty"),
    (["--export="], "--export is empty"),
    (["--save_int4="], "--save_int4 is empty"),
    (["--start=caf\udce9"], "--start is not UTF-8 text"),
    (["--start=Hello, ünknown"], "lacks ',' 'H' 'ü'"),
    (["--start=" + "a" * 33], "33 tokens.*block_size=32"),
    (["--start=FILE:"], "names no file"),
    (["--start=FILE:/dev/zero"], "/dev/zero is a device, not a file"),
    (["--start=FILE:/dev/null"], "prompt is empty"),
    (["--start=FILE:no/such.txt"], "cannot read the prompt no/such.txt"),
    (["--max_new_tokens=0"], "max_new_tokens must be positive, not 0"),
    (["--num_samples=0"], "num_samples must be positive"),
    (["--temperature=-1"], "temperature"),
    (["--top_p=0"], r"top_p must lie in \(0, 1\]"),
    (["--top_p=1.1"], "top_p"),
    (["--top_k=0"], "top_k"),
    (["--kv_bits=3"], "kv_bits=3"),
    (["--slide=0"], "slide=0"),
    (["--slide=33"], "slide=33"),
    (["--group_size=48"], "group_size=48"),
    (["--int4=True", "--group_size=128"], "does not divide the 64 inputs"),
    (["--save_int4=x.safetensors"], "needs --int4=True"),
    (["--int4_tune=5"], "int4_tune needs --int4=True"),
    (["--int4=True", "--int4_tune=-5"], "int4_tune=-5"),
    (["--int4=True", "--export=x"], "export writes float weights"),
    (["--attention_policy=grouped"], "fewer key/value heads"),
    (["--kv-heads=2"], "^kv_heads=2: the model's weights have 4"),
    (["--q-chunk=0"], "q_chunk must be positive"),
    (["--k-chunk=5"], "k_chunk=5 does nothing"),
    (["--attention_policy=magic"], "unknown attention_policy 'magic'"),
    (["--chat=True"], "no chat format"),
    (["--init_from=no/such/model/here"], "no such folder"),
    (["--init_from=broken.safetensors"], "cannot read broken.safetensors"),
    (["--out_dir=nowhere"], "no checkpoint at"),
    (["--dtype=float8"], "unknown dtype"),
    (["--device=tpu"], "device"),
    (["--tempreature=1"], "temperature"),
]


@pytest.mark.parametrize(
    "flags,message", MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_mistakes_are_one_clear_error(out_dir, flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match=message):
        sample.main([f"--out_dir={out_dir}", "--device=cpu", "--start=hello", *flags])
    assert [p.name for p in tmp_path.iterdir()] == ["broken.safetensors"]


@pytest.mark.parametrize("chat, what", [(False, "tokenizer"), (True, "chat format")])
def test_a_prompt_that_becomes_no_tokens_is_no_empty_prompt(chat, what):
    def none(text):
        return []

    text = SimpleNamespace(tokenizer=SimpleNamespace(encode=none), chat_ids=none)
    with pytest.raises(UserError, match=f"the model's {what} makes no tokens of the prompt"):
        sample.prompt_ids(text, "hello", chat, True, 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_asked_for_but_absent(out_dir):
    with pytest.raises(UserError, match="(?i)cuda"):
        sample.main([f"--out_dir={out_dir}", "--device=cuda"])


@pytest.mark.slow
def test_the_script_exits_with_2_and_one_line(out_dir, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "sample.py",
            f"--out_dir={out_dir}",
            "--device=cpu",
            f"--start=FILE:{tmp_path / 'latin.txt'}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the prompt") and done.stderr.count("\n") == 1


def test_a_temperature_towards_zero_is_greedy_and_damaged_weights_are_one_line(
    capsys, out_dir, tmp_path
):
    flags = "--num_samples=1", "--top_k=None"
    cold, greedy = (
        run(capsys, out_dir, t, *flags)[0] for t in ("--temperature=1e-40", "--temperature=0")
    )
    assert cold == greedy
    checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
    checkpoint["model"]["transformer.h.1.mlp.c_fc.weight"][0, 0] = torch.nan
    (tmp_path / "damaged").mkdir()
    torch.save(checkpoint, tmp_path / "damaged" / "ckpt.pt")
    with pytest.raises(UserError, match="NaN or infinite"):
        run(capsys, tmp_path / "damaged", "--stream=True")
