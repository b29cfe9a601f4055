"""compare.py as a user runs it: on finished runs, runs going on, nanoGPT's, and what is no run."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tiny_run import arguments

import compare
import train
from leangpt.runs.curves import curves_figure
from leangpt.runs.run import read_run
from leangpt.system.errors import UserError

HEADER = "iter,tokens,loss,train_loss,val_loss,lr,grad_norm,tokens_per_s,ms,peak_mb,seconds\n"
DATA = {"name": "poems", "sha256": "ab" * 32, "tokenizer": "char", "vocab_size": 65}
FACTS = {"parameters": 1000, "state_bytes": 8_000_000, "dataset": DATA, "commit": "1234567"}


def evaluation(at, loss, seconds):
    return f"{at},{100 * at},,{loss},{loss},,,,,,{seconds}\n"


def report(at, loss, seconds, peak="12.5", rate=1000):
    return f"{at},{100 * at},{loss},,,0.002,1.0,{rate},5.0,{peak},{seconds}\n"


LOSSES = {0: 4.2, 100: 2.5, 200: 1.75, 300: 1.8}


def write_run(folder, losses=LOSSES, facts=FACTS, more="", **settings):
    """A folder as train.py leaves it, without the checkpoints."""
    folder.mkdir()
    lines = [line for at, loss in losses.items() for line in (evaluation(at, loss, at / 10),)]
    lines.insert(1, report(0, 4.1, 0.2, rate=10))  # a slow first step
    lines.insert(2, report(10, 3.9, 1.1))
    (folder / "metrics.csv").write_text(HEADER + "".join(lines) + more)
    settings = {"out_dir": folder.name, "dataset": "poems", "max_iters": 300, **settings}
    (folder / "config.json").write_text(json.dumps(settings))
    if facts is not None:
        (folder / "run.json").write_text(json.dumps(facts))
    return folder


def nanogpt_checkpoint(folder, **more):
    folder.mkdir()
    weight = torch.ones(3, 4)
    adamw = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 4), "exp_avg_sq": torch.ones(3, 4)}
    saved = {
        "model": {"_orig_mod.transformer.wte.weight": weight, "_orig_mod.lm_head.weight": weight},
        "optimizer": {"state": {0: adamw}, "param_groups": [{"params": [0]}]},
        "model_args": {"n_layer": 1},
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "poems", "max_iters": 5000, "learning_rate": 1e-3},
    }
    torch.save(saved | more, folder / "ckpt.pt")
    return folder


def run_compare(folder, *words, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "compare.py", *words],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """A function: compare.py's lines on stdout when called with the words, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        compare.main(list(words))
        return capsys.readouterr().out.splitlines()

    return call


def cells(line):
    return line.split()


# ------------------------------------------------------------------ the table


@pytest.mark.slow
def test_a_run_of_train_py_is_read_whole(tmp_path, said):
    for variant in ("adam", "adamsn"):
        flags = ("--max_iters=6", "--eval_interval=3", f"--optimizer_variant={variant}")
        train.main(arguments(tmp_path, f"out-{variant}", *flags))
    lines = said("out-adam", "out-adamsn/", "--csv=table.csv")
    first = next(line for line in lines if line.startswith("out-adam "))
    assert "optimizer_variant=adam" in first and "6" == cells(first)[1]
    with open("table.csv", newline="") as file:
        adam, adamsn = csv.DictReader(file)
    with open("out-adam/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert adam["final_val_loss"] == rows[-1]["val_loss"]
    assert float(adam["seconds"]) == float(rows[-1]["seconds"])
    assert adam["dataset"] == "tiny" and adam["tokenizer"] == "char"
    assert int(adam["peak_bytes"]) > int(adam["state_bytes"]) + 4 * int(adam["parameters"])
    assert 0 < int(adamsn["state_bytes"]) < int(adam["state_bytes"])
    assert 8 * int(adam["parameters"]) <= int(adam["state_bytes"])
    assert (adam["optimizer_variant"], adamsn["optimizer_variant"]) == ("adam", "adamsn")
    assert "out_dir" not in adam and "seed" not in adam
    assert os.path.getsize("compare.png") > 10_000 and "picture in compare.png" in lines[-1]


def test_the_columns_of_a_finished_run(tmp_path, said):
    write_run(tmp_path / "a")
    header, line, *_ = said("a")
    assert cells(header)[-3:] == ["MB", "tokens/s", "seconds"]
    assert cells(line) == ["a", "300", "1.8000", "1.7500", "200", "8.00", "12.5", "1,000", "30.0"]


@pytest.mark.slow
def test_settings_that_differ_stand_beside_their_run_or_below(tmp_path, said, monkeypatch):
    write_run(tmp_path / "a", learning_rate=1e-3, seed=1, dropout=0)
    write_run(tmp_path / "b", learning_rate=None, seed=1, dropout=0.0)
    write_run(tmp_path / "c", seed=1)  # knows no learning_rate: an older or a foreign run
    lines = said("a", "b", "c")
    assert [line.endswith(text) for line, text in zip(lines[1:3], ("=0.001", "=None"))] == [
        True
    ] * 2
    assert "learning_rate" not in lines[3] and not any("seed" in line for line in lines)
    assert not any("dropout" in line for line in lines)
    monkeypatch.setenv("COLUMNS", "80")
    lines = said("a", "b", "c")
    assert "learning_rate" not in "".join(lines[:4])
    assert lines[5:9] == ["settings that differ", "a    learning_rate=0.001"] + [
        "b    learning_rate=None",
        "c    -",
    ]


@pytest.mark.slow
def test_runs_that_used_other_data_are_named(tmp_path, said):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", facts={**FACTS, "dataset": {**DATA, "sha256": "cd" * 32}})
    write_run(tmp_path / "c", facts={**FACTS, "dataset": {**DATA, "name": "same, renamed"}})
    write_run(tmp_path / "d", facts={**FACTS, "dataset": {**DATA, "tokenizer": "gpt2"}})
    lines = said("a", "b", "c", "d")
    at = lines.index("other data, so their losses do not compare:")
    assert lines[at + 1 : at + 4] == [
        "  poems (char tokens, sha256 cdcdcdcdcdcd): b",
        "  poems (gpt2 tokens, sha256 abababababab): d",
        "  poems (char tokens, sha256 abababababab): a, c",
    ]
    assert "data: poems (char tokens, sha256 abababababab)" in said("a", "c")


def test_an_older_run_is_judged_by_its_data_sets_name(tmp_path, said):
    write_run(tmp_path / "a")
    write_run(tmp_path / "older", facts=None)
    write_run(tmp_path / "other", facts=None, dataset="songs")
    lines = said("a", "older", "other")
    assert "  songs: other" in lines
    assert "data, commit and machine were not recorded by older, other" in lines
    line = next(line for line in lines if line.startswith("older"))
    # its peak_mb was the resident set, which is no peak of the allocator
    assert cells(line)[5:7] == ["-", "-"]


@pytest.mark.slow
def test_other_commits_and_machines_are_named(tmp_path, said):
    write_run(tmp_path / "a", facts={**FACTS, "machine": "m"})
    write_run(tmp_path / "b", facts={**FACTS, "machine": "m", "commit": "89abcde+"})
    lines = said("a", "b")
    at = lines.index("other commits:")
    assert lines[at + 1 : at + 3] == ["  1234567: a", "  89abcde+: b"]
    assert not any("machines" in line for line in lines)
    for name in "cde":
        write_run(tmp_path / name, facts={**FACTS, "machine": "m"})
    assert "  1234567: the others" in said(*"abcde")
    assert not any("commits" in line for line in said("a"))


# ------------------------------------------------------------------ runs going on


def test_a_run_going_on_is_read_up_to_its_last_whole_line(tmp_path, said):
    write_run(tmp_path / "a", more=report(310, 1.7, 31.0) + "320,32000,1.6,,,0.0", max_iters=2000)
    line = said("a")[1]
    assert "311 of 2,000" in line and "31.0" in line


@pytest.mark.parametrize("text", ["", HEADER[:20], HEADER, HEADER + evaluation(0, 4.2, 0.0)])
def test_a_run_that_has_just_begun(tmp_path, said, text):
    write_run(tmp_path / "a")
    new = tmp_path / "new"
    new.mkdir()
    (new / "metrics.csv").write_text(text)
    lines = said("a", "new")
    assert cells(lines[2])[:2] == ["new", "0"]
    assert ("no evaluation yet in new" in lines) == ("4.2" not in text)
    assert os.path.exists("compare.png")


def test_no_evaluation_yet_but_a_loss(tmp_path, said):
    write_run(tmp_path / "a", losses={})
    assert "no evaluation yet in a: the batch of iteration 10 had a loss of 3.9000" in said("a")


# ------------------------------------------------------------------ nanoGPT's


def test_a_folder_of_nanogpt(tmp_path, said):
    nanogpt_checkpoint(tmp_path / "theirs")
    write_run(tmp_path / "ours", learning_rate=2e-3)
    lines = said("theirs", "ours", "--csv=table.csv")
    assert cells(lines[1])[:6] == ["theirs", "250", "of", "5,000", "-", "1.5000"]
    assert "max_iters=5000, learning_rate=0.001" in lines[1]
    with open("table.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["parameters"], row["state_bytes"]) == ("12", str(4 + 2 * 12 * 4))
    assert "data: poems (char tokens, sha256 abababababab)" in lines


# ------------------------------------------------------------------ the picture


@pytest.mark.slow
def test_the_legend_names_every_run(tmp_path):
    names = ["plain", "_hidden", "$\\frac$", "x" * 200] + [f"run{i}" for i in range(30)]
    runs = [read_run(write_run(tmp_path / name)) for name in names]
    runs.append(read_run(nanogpt_checkpoint(tmp_path / "theirs")))
    runs.append(read_run(write_run(tmp_path / "begun", losses={})))
    for run in runs:
        run.name = os.path.basename(run.name)
    figure = curves_figure(runs)
    figure.savefig(tmp_path / "all.png")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == len(runs) and len(figure.axes[0].lines) == len(runs)
    for run, text in zip(runs, texts):
        assert run.name in text.replace("\n", "")
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines[:32]}
    assert len(looks) == 32
    # the legend lies below the axes, inside the picture
    box = figure.legends[0].get_window_extent()
    assert box.y0 >= 0 and all(box.y1 <= axis.get_window_extent().y0 for axis in figure.axes)


def test_the_legend_has_settings_that_differ_if_they_are_few(tmp_path):
    runs = [read_run(write_run(tmp_path / name, optimizer_variant=name)) for name in ("a", "b")]
    texts = [text.get_text().replace("\n", " ") for text in legend_texts(runs)]
    assert texts[0].endswith("; optimizer_variant=a") and texts[1].endswith("; optimizer_variant=b")
    runs[0].settings["more"], runs[1].settings["more"] = "a" * 50, "b" * 50
    assert not any("optimizer_variant" in text.get_text() for text in legend_texts(runs))


def test_the_curves_are_those_of_the_files(tmp_path):
    runs = [read_run(write_run(tmp_path / "a")), read_run(nanogpt_checkpoint(tmp_path / "theirs"))]
    figure = curves_figure(runs)
    ours, theirs = figure.axes[0].lines
    assert list(ours.get_xdata()) == list(LOSSES) and list(ours.get_ydata()) == [*LOSSES.values()]
    assert list(figure.axes[1].lines[0].get_xdata()) == [0, 10, 20, 30]
    assert (theirs.get_xdata()[0], theirs.get_ydata()[0]) == (250, 1.5)
    low, high = figure.axes[0].get_ylim()
    assert low < 1.5 and 2.5 < high < 4.2  # framed by the losses after the first step
    assert figure.axes[0].get_yscale() == "log" and figure.axes[0].get_xscale() == "linear"


def test_runs_of_very_different_length_are_drawn_over_a_logarithmic_axis(tmp_path):
    short, long = ({at * scale: loss for at, loss in LOSSES.items()} for scale in (1, 100))
    runs = [read_run(write_run(tmp_path / str(n), each)) for n, each in enumerate((short, long))]
    assert [axis.get_xscale() for axis in curves_figure(runs).axes] == ["log", "log"]
    runs[0] = read_run(write_run(tmp_path / "begun", {0: 4.2}))
    assert [axis.get_xscale() for axis in curves_figure(runs).axes] == ["linear", "linear"]


def legend_texts(runs):
    return curves_figure(runs).legends[0].get_texts()


def test_the_legend_says_who_used_other_data(tmp_path):
    runs = [read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b"))]
    texts = [text.get_text().replace("\n", " ") for text in legend_texts(runs)]
    assert not any("poems" in text or ";" in text for text in texts)
    runs[1].facts = {**FACTS, "dataset": {**DATA, "name": "songs", "sha256": "cd" * 32}}
    texts = [text.get_text().replace("\n", " ") for text in legend_texts(runs)]
    assert "; on poems (char tokens, sha256 ab" in texts[0] and "; on songs (" in texts[1]


@pytest.mark.parametrize("losses", [{0: 4.2}, {0: 4.2, 5: float("nan")}, {0: 4.2, 5: 3.0}])
def test_few_and_broken_losses_are_drawn(tmp_path, losses):
    curves_figure([read_run(write_run(tmp_path / "a", losses))]).savefig(tmp_path / "a.svg")


@pytest.mark.slow
def test_no_display_is_needed(tmp_path):
    write_run(tmp_path / "a")
    done = run_compare(tmp_path, "a", "--out", "b.pdf", DISPLAY="", MPLBACKEND="tkagg", TERM="dumb")
    assert done.returncode == 0 and done.stderr == "" and "picture in b.pdf" in done.stdout
    assert (tmp_path / "b.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_name_on_any_terminal(tmp_path, encoding):
    names = ["d\u00e9j\u00e0", "\u5bab", os.fsdecode(b"\xff\xfe")]
    for name in names:
        write_run(tmp_path / name)
    environment = {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, ROOT / "compare.py", *names, "--csv=table.csv"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b" 1.8000 ") == 3 and b"\\udcff\\udcfe" in done.stdout
    assert os.path.exists(tmp_path / "compare.png")


# ------------------------------------------------------------------ what is wrong with the input


def error_of(tmp_path, *words):
    """The one line on stderr of a call that has to end with status 2."""
    done = run_compare(tmp_path, *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.slow
def test_folders_without_a_run_are_named_together(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()  # a published model has a config.json, too
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "no run in empty, nope, model:" in error_of(tmp_path, "empty", "a", "nope", "model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which runs?"),
        (["a", "--out=a.jpg"], "--out=a.jpg: a picture's name ends in .png, .svg, .pdf"),
        (["a", "--out=no/a.png"], "--out=no/a.png: No such file"),
        (["a", "--csv=no/a.csv"], "--csv=no/a.csv: No such file"),
        (["a", "--cvs=a.csv"], "unknown setting on the command line: --cvs (did you mean csv?)"),
    ],
)
def test_wrong_words(tmp_path, monkeypatch, words, message):
    write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        compare.main(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.csv", "epoch,acc\n1,2\n", "lacks the columns iter, loss, val_loss, seconds"),
        ("metrics.csv", HEADER + "1,2\n" + report(2, 3, 4), "line 2: 2 cells where the header has"),
        ("metrics.csv", HEADER + report(1, 2, 3) + report(2, "x", 4), "line 3: could not convert"),
        ("metrics.csv", HEADER + report(1, 2, ""), "line 2: no iteration or no seconds"),
        ("metrics.csv", HEADER + report(1.5, 2, 3), "line 2: no iteration or no seconds"),
        ("metrics.csv", HEADER + "\0" * 50 + "\n", "line 2: 1 cells where the header has 11"),
        ("metrics.csv", b"\xff\xfe\n", "cannot read"),
        ("config.json", '{"seed": 1', "config.json is damaged"),
        ("config.json", "[1, 2]", "config.json is damaged: it holds no settings"),
        ("run.json", "", "run.json is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, message):
    folder = write_run(tmp_path / "a")
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_run(folder)
    assert message in str(error.value) and f"a/{file}" in str(error.value)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_where_nothing_else_tells(tmp_path):
    folder = nanogpt_checkpoint(tmp_path / "theirs")
    (folder / "ckpt.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:500])
    assert "theirs/ckpt.pt is truncated or not a checkpoint" in error_of(tmp_path, "theirs")
