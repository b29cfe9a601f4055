import contextlib
import errno
import os
import pathlib
import pickle
import random
import resource
import signal
import zipfile

import numpy as np
import psutil
import pytest
import torch
from tiny_run import run_script

from leangpt.optim import build_optimizer
from leangpt.optim.resume import load_optimizer
from leangpt.runs.checkpoint import (
    BEST,
    LAST,
    checkpoint_to_resume,
    copy_checkpoint,
    load_checkpoint,
    model_args,
    model_from_checkpoint,
    save_checkpoint,
)
from leangpt.system.errors import RunError, UserError
from model import GPT, GPTConfig


def tiny_model(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
    return GPT(GPTConfig(**shape | changes))


def one_step(model, optimizer):
    tokens = torch.arange(8).view(1, 8)
    model(tokens, tokens)[1].backward()
    optimizer.step()
    optimizer.zero_grad()


def checkpoint_of(model, optimizer=None):
    return {
        "model": model.state_dict(),
        "model_args": model_args(model),
        "iter_num": 3,
        "optimizer": optimizer.state_dict() if optimizer else None,
        "best_val_loss": 1.5,
        "config": {"seed": 1},
    }


def test_round_trip_is_bitwise(tmp_path):
    model = tiny_model()
    optimizer = build_optimizer(model, "adam")
    one_step(model, optimizer)
    save_checkpoint(tmp_path / BEST, checkpoint_of(model, optimizer))
    loaded = load_checkpoint(tmp_path / BEST)
    assert loaded["iter_num"] == 3 and loaded["best_val_loss"] == 1.5
    assert os.listdir(tmp_path) == [BEST]  # no temporary file stays
    again = model_from_checkpoint(GPT, loaded)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    fresh = build_optimizer(again, "adam")
    assert load_optimizer(fresh, again, loaded["optimizer"]) is None
    one_step(model, optimizer)
    one_step(again, fresh)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_free_settings_can_change_and_shapes_cannot():
    checkpoint = checkpoint_of(tiny_model())
    model = model_from_checkpoint(GPT, checkpoint, dropout=0.2, attention_policy="recompute")
    assert model.config.dropout == 0.2 and model.config.attention_policy == "recompute"
    with pytest.raises(UserError, match="n_layer cannot be changed"):
        model_from_checkpoint(GPT, checkpoint, n_layer=3)


def test_copy_is_the_same_and_independent(tmp_path):
    best, last = tmp_path / BEST, tmp_path / LAST
    save_checkpoint(best, checkpoint_of(tiny_model()))
    save_checkpoint(last, {"old": 1})
    copy_checkpoint(best, last)
    assert last.read_bytes() == best.read_bytes()
    kept = best.read_bytes()
    save_checkpoint(last, {"newer": 2})
    assert best.read_bytes() == kept


def test_best_and_last_are_two_files_on_the_disk(tmp_path):
    """What rots in one of them has not rotted in the other, and the error says which is whole."""
    save_checkpoint(tmp_path / BEST, checkpoint_of(tiny_model()))
    copy_checkpoint(tmp_path / BEST, tmp_path / LAST)
    content = bytearray((tmp_path / LAST).read_bytes())
    content[len(content) // 2] ^= 1
    with open(tmp_path / LAST, "r+b") as file:
        file.write(content)
    with pytest.raises(UserError, match=r"ckpt_last.pt is truncated .*ckpt.pt is whole \(iterat"):
        load_checkpoint(tmp_path / LAST)
    assert load_checkpoint(tmp_path / BEST)["iter_num"] == 3
    (tmp_path / BEST).write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_checkpoint(tmp_path / LAST)
    assert "is whole" not in str(refused.value)


@pytest.mark.slow
def test_a_flipped_bit_or_a_zeroed_page_anywhere_is_refused_or_harmless(tmp_path):
    """Harmless: in the padding between entries, which nobody reads."""
    path, model = tmp_path / "one.pt", tiny_model()
    optimizer = build_optimizer(model, "muonsn8")
    one_step(model, optimizer)
    save_checkpoint(path, checkpoint_of(model, optimizer))
    whole, want = path.read_bytes(), repr(load_checkpoint(path))
    choose = random.Random(0)
    refused = 0
    for _ in range(300):
        content, at = bytearray(whole), choose.randrange(len(whole))
        if choose.random() < 0.8:
            content[at] ^= 1 << choose.randrange(8)
        else:
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        path.write_bytes(content)
        try:
            assert repr(load_checkpoint(path)) == want, at
        except UserError:
            refused += 1
    assert refused > 150


@pytest.mark.slow
def test_no_bit_of_a_tensors_place_in_the_file_goes_unseen(tmp_path):
    """What precedes a tensor's bytes, and its line in the zip's directory: nothing checks these."""
    path, model = tmp_path / "one.pt", tiny_model()
    save_checkpoint(path, checkpoint_of(model, build_optimizer(model, "adamsn")))
    whole, want = path.read_bytes(), repr(load_checkpoint(path))
    with zipfile.ZipFile(path) as file:
        place = next(e.header_offset for e in file.infolist() if "/data/" in e.filename)
    listed = whole.rindex(b"PK\1\2", 0, whole.rindex(b"/data/0"))
    for start, size in ((place, 30), (listed, 46)):
        for bit in range(8 * size):
            content = bytearray(whole)
            content[start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            with contextlib.suppress(UserError):
                assert repr(load_checkpoint(path)) == want, (start, bit)


@pytest.mark.parametrize(
    "entry, value",
    [
        ("model", 3),
        ("model", {"w": 1}),
        ("model", {"w": torch.ones(2, 2).to_sparse()}),
        ("model", {1: torch.ones(2)}),
        ("model_args", [1]),
        ("iter_num", "3"),
        ("iter_num", -1),
        ("iter_num", 1.5),
        ("best_val_loss", "low"),
        ("best_val_loss", torch.ones(2)),
        ("train_seconds", {}),
        ("train_seconds", 2**63),
        ("train_seconds", -1.0),
        ("config", 1),
        ("dataset", "tiny"),
        ("optimizer", [1]),
        ("scaler", 7),
    ],
)
def test_entries_of_a_wrong_type(tmp_path, entry, value):
    save_checkpoint(tmp_path / BEST, checkpoint_of(tiny_model()) | {entry: value})
    with pytest.raises(UserError, match=f"is damaged: {entry} is a|a tensor lacks numbers"):
        load_checkpoint(tmp_path / BEST)


def test_the_latest_state_is_resumed(tmp_path):
    assert checkpoint_to_resume(tmp_path) == tmp_path / BEST
    save_checkpoint(tmp_path / LAST, {})
    assert checkpoint_to_resume(tmp_path) == tmp_path / LAST


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 not a zip", b"\x80\x04}.", pickle.dumps({"model": 1}), b"hello" * 1000],
)
def test_foreign_files(tmp_path, content):
    path = tmp_path / BEST
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint") as caught:
        load_checkpoint(path)
    assert "()" not in str(caught.value) and path.read_bytes() == content


def test_missing_and_directory(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at .*ckpt.pt; train first"):
        load_checkpoint(tmp_path / BEST)
    with pytest.raises(UserError, match="is a folder, not a file"):
        load_checkpoint(tmp_path)


def test_what_the_system_refuses_is_no_damage(tmp_path, monkeypatch):
    """A broken disk happens to a run (status 1), and the file may be whole."""
    save_checkpoint(tmp_path / LAST, checkpoint_of(tiny_model()))

    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("leangpt.runs.bounds.is_zip", broken)
    with pytest.raises(RunError, match="^cannot read .*ckpt_last.pt: Input/output error$"):
        load_checkpoint(tmp_path / LAST)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, part):
    path = tmp_path / BEST
    save_checkpoint(path, checkpoint_of(tiny_model()))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [{"weights": torch.ones(2)}, [1, 2], torch.ones(3)])
def test_torch_files_that_are_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / BEST)
    with pytest.raises(UserError, match="it lacks model, model_args, iter_num"):
        load_checkpoint(tmp_path / BEST)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint_of(tiny_model()) | {"config": Harmful()}, BEST)
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(BEST)
    assert not os.path.exists("harm")


def test_weights_that_do_not_fit_their_model_args():
    checkpoint = checkpoint_of(tiny_model())
    checkpoint["model_args"]["n_embd"] = 16
    with pytest.raises(UserError, match="do not fit its model_args"):
        model_from_checkpoint(GPT, checkpoint)


def test_prefixes_and_mask_buffers_of_other_programs_are_cleaned(tmp_path):
    model = tiny_model()
    checkpoint = checkpoint_of(model)
    checkpoint["model"] = {f"_orig_mod.{n}": t for n, t in checkpoint["model"].items()}
    checkpoint["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    checkpoint["best_val_loss"] = torch.tensor(2.5)
    save_checkpoint(tmp_path / BEST, checkpoint)
    loaded = load_checkpoint(tmp_path / BEST)
    assert list(loaded["model"]) == list(model.state_dict()) and loaded["best_val_loss"] == 2.5


@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
def test_numpy_scalars_are_read_as_numbers(tmp_path, core):
    """As forks of nanoGPT save them; older versions of NumPy call its inner package otherwise."""
    path, values = tmp_path / BEST, [np.float64(0.1), np.float32(2.5), np.int64(-3), np.bool_(True)]
    config = {str(i): value for i, value in enumerate(values)}
    checkpoint = checkpoint_of(tiny_model()) | {"best_val_loss": np.float64(1.25), "config": config}
    torch.save(checkpoint | {"iter_num": np.int64(7)}, path)
    if core == "numpy.core":
        rewrite(path, lambda content: content.replace(b"cnumpy._core.", b"cnumpy.core."))
    loaded = load_checkpoint(path)
    assert loaded["iter_num"] == 7 and loaded["best_val_loss"] == 1.25
    assert [loaded["config"][key] for key in config] == [0.1, 2.5, -3, True]
    assert [type(value) for value in loaded["config"].values()] == [float, float, int, bool]


def rewrite(path, change):
    """Replace the pickle inside a file of torch.save's."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, content in entries.items():
            new.writestr(name, change(content) if name.endswith("/data.pkl") else content)


@pytest.mark.parametrize(
    "value, words",
    [
        (np.zeros(2), "holds an object of numpy._core.multiarray._reconstruct, which could run"),
        (pathlib.PurePosixPath("x"), "holds an object of pathlib.PurePosixPath"),
        (np.complex64(1), "numpy value of type 'c8'"),
    ],
)
def test_other_objects_are_refused_by_name(tmp_path, value, words):
    torch.save(checkpoint_of(tiny_model()) | {"config": {"x": value}}, tmp_path / BEST)
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / BEST)


def nanogpt_optimizer(model):
    """AdamW as nanoGPT makes it: matrices in one group, vectors in another."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
    )


def test_nanogpt_optimizer_state_finds_its_parameters():
    theirs = tiny_model(bias=True)
    optimizer = nanogpt_optimizer(theirs)
    one_step(theirs, optimizer)
    ours = tiny_model(bias=True)
    adam = build_optimizer(ours, "adam", learning_rate=5e-4)
    assert load_optimizer(adam, ours, optimizer.state_dict()) is None
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters()):
        assert torch.equal(optimizer.state[a]["exp_avg"], adam.state[b]["exp_avg"]), name
        assert torch.equal(optimizer.state[a]["exp_avg_sq"], adam.state[b]["exp_avg_sq"]), name
        assert float(adam.state[b]["step"]) == 1
    assert {group["initial_lr"] for group in adam.param_groups} == {5e-4}


def test_nanogpt_optimizer_state_that_cannot_fit_is_refused_with_a_reason():
    theirs = tiny_model()
    optimizer = nanogpt_optimizer(theirs)
    one_step(theirs, optimizer)
    ours = tiny_model()
    adamsn = build_optimizer(ours, "adamsn")
    assert "does not fit AdamSN" in load_optimizer(adamsn, ours, optimizer.state_dict())
    deeper = tiny_model(n_layer=3)
    adam = build_optimizer(deeper, "adam")
    assert "parameters" in load_optimizer(adam, deeper, optimizer.state_dict())
    wider = tiny_model(n_embd=16)
    adam = build_optimizer(wider, "adam")
    reason = load_optimizer(adam, wider, optimizer.state_dict())
    assert reason == "exp_avg of a weight (11, 16) is torch.float32 (11, 8)"
    assert not adamsn.state and not adam.state


def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / BEST
    save_checkpoint(path, checkpoint_of(tiny_model()))
    kept = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, limits[1]))
        with pytest.raises(UserError, match="^cannot write .*File too large"):
            save_checkpoint(path, checkpoint_of(tiny_model(n_embd=32)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, usual)
    assert path.read_bytes() == kept and os.listdir(tmp_path) == [BEST]


@pytest.mark.slow
def test_scripts_say_it_in_one_line(tmp_path):
    (tmp_path / BEST).write_bytes(b"half a file")
    result = run_script("train.py", "--init_from=resume", f"--out_dir={tmp_path}")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == [BEST]


def test_tensors_may_stay_in_the_file(tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"model": {"w": torch.ones(10**6)}, "model_args": {}, "iter_num": 1})
    for mmap in (False, True):
        checkpoint = load_checkpoint(path, mmap=mmap)
        # The process's map of files, not its size: freed memory is used again, files stay named.
        mapped = {part.path for part in psutil.Process().memory_maps()}
        assert (str(path.resolve()) in mapped) is mmap
        assert checkpoint["model"]["w"].shape == (10**6,)
        del checkpoint
