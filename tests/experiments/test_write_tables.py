"""The pages' tables come from the CSVs: rewritten where stale, refused where they cannot be."""

import contextlib
import io
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from experiments.report import draw_pictures, optimizer_tables, write_tables
from experiments.report.front_tables import fitting
from experiments.report.optimizer_plots import LOOK, PANELS
from experiments.report.table_tools import FIGURES, PUBLISHED, TABLES, label, made_on
from experiments.shared import two_commands
from experiments.shared.common import RESULTS, read_csv, write_csv
from leangpt.optim import VARIANTS
from leangpt.system.errors import UserError, exit_cleanly

ROW = {
    "seq": 2048,
    "policy": "plain",
    "mode": "forward",
    "q_chunk": "",
    "k_chunk": "",
    "time_s": 1.5,
    "time_vs_plain": 1.0,
    "peak_MB": 416.0,
    "max_rel_err": 2e-7,
    "grad_rel_err": "",
    "machine": "a machine",
    "torch": "2.13",
    "commit": "abc",
}
README = """before

<!-- table: attention_forward -->
stale

<!-- end table -->

between

<!-- table: attention_errors -->
<!-- end table -->

after
"""


@pytest.fixture
def folder(tmp_path):
    write_csv(
        tmp_path / "results" / "attention_scaling.csv",
        [
            ROW,
            ROW | {"policy": "recompute", "time_s": 0.04, "time_vs_plain": 0.9, "peak_MB": 17.04},
            ROW | {"seq": 4096, "policy": "recompute", "time_vs_plain": ""},
        ],
    )
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def run(folder, *arguments):
    """The script on that folder's page, in this process: its exit status and stderr."""
    flags = [f"--pages={folder}/README.md", f"--results={folder}/results", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["write_tables.py", *flags])
        try:
            exit_cleanly(write_tables.main)
            status = 0
        except SystemExit as end:
            status = end.code
    return SimpleNamespace(returncode=status, stderr=said.getvalue())


def test_blocks_are_rewritten_and_then_agree(folder):
    stale = run(folder, "--check")
    assert stale.returncode == 1 and "stale" in stale.stderr
    assert (folder / "README.md").read_text() == README  # --check changes nothing
    assert run(folder).returncode == 0
    text = (folder / "README.md").read_text()
    assert "| 2,048 | 1.50 s, 416 MB | 40.0 ms (0.90×), 17 MB |" in text
    assert "| 4,096 | – | 1.50 s, 416 MB |" in text
    assert "a machine; torch 2.13; commit abc." in text
    assert "stale" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert run(folder, "--check").returncode == 0
    write_csv(folder / "results" / "attention_scaling.csv", [ROW | {"time_s": 2.5}])
    assert run(folder, "--check").returncode == 1


def test_figures_in_a_sentence_follow_the_results(folder):
    row = {"name": "recompute", "T": 16384, "peak_GB": 3.2003}
    write_csv(folder / "results" / "long_training.csv", [row, row | {"peak_GB": 2.94}])
    page = folder / "README.md"
    page.write_text("in <!-- figure: long_training_peak -->2.9 GB<!-- end --> at most\n")
    assert run(folder, "--check").returncode == 0
    write_csv(folder / "results" / "long_training.csv", [row])
    assert run(folder, "--check").returncode == 1  # the sentence still has the old number
    assert run(folder).returncode == 0
    assert page.read_text() == "in <!-- figure: long_training_peak -->3.2 GB<!-- end --> at most\n"
    with pytest.raises(UserError, match="a figure 'nonsense'.*muonsn8_gain"):
        write_tables.rewrite("by <!-- figure: nonsense --><!-- end -->", folder / "results")


def test_every_registered_figure_is_in_a_page_and_says_a_number():
    pages = "".join((ROOT / name).read_text() for name in write_tables.PAGES)
    for name, (_, files) in FIGURES.items():
        text = f"by <!-- figure: {name} --><!-- end -->"
        made = write_tables.rewrite(text, RESULTS)
        assert any(character.isdigit() for character in made[len(text) - 12 :]), (name, files)
        assert f"<!-- figure: {name} -->" in pages, name


DEMO = """\
some package installed
text: 10 characters from a file
  because it is there
already there
device     cpu
model      8 parameters
batch      64 tokens
step 0: train loss 4.1, val loss 4.2
iter 90: loss 2.6
iter 100: loss 2.5
step 250: train loss 2.0, val loss 2.1
step 500: train loss 1.9, val loss 2.0 (best)
done: 500 iterations, 74.5 s of training; best val loss 2.0
model: 0.0M parameters in float32

HAMLET:
To be,
or not
to be.
---------------
600.0 tokens/s, prompts included (1 at once)
"""


def test_the_demo_is_shortened_to_what_the_readme_shows():
    shown, training = two_commands.shorten_demo(DEMO)
    assert training == 74.5
    assert shown.splitlines() == [
        "text: 10 characters from a file",
        "  because it is there",
        "device     cpu",
        "model      8 parameters",
        "step 0: train loss 4.1, val loss 4.2",
        "iter 100: loss 2.5",
        "step 500: train loss 1.9, val loss 2.0 (best)",
        "HAMLET:",
        "To be,",
        "or not",
        "600.0 tokens/s, prompts included (1 at once)",
    ]


def test_a_fresh_copy_has_what_git_tracks_and_nothing_else(tmp_path, repository, monkeypatch):
    monkeypatch.setattr(two_commands, "ROOT", repository)
    (repository / "code.py").write_text("edited\n")
    (repository / "untracked").write_text("")
    two_commands.fresh_copy(tmp_path / "copy")
    files = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert {path.name: path.read_text() for path in files} == {
        "code.py": "edited\n",
        "kernel.c": "1;\n",
        "notes.txt": "2\n",
    }


def test_unknown_tables_and_missing_results_are_named(folder):
    with pytest.raises(UserError, match="a table 'nonsense'.*attention_forward"):
        write_tables.rewrite("<!-- table: nonsense -->\n<!-- end table -->", folder / "results")
    with pytest.raises(UserError, match="attention_chunks.csv, which does not exist"):
        write_tables.rewrite(
            "<!-- table: attention_chunks -->\n<!-- end table -->", folder / "results"
        )
    (folder / "README.md").unlink()
    assert run(folder).returncode == 2


@pytest.mark.parametrize(
    "block, file",
    [
        ("<!-- table: optimizers_grids -->\n<!-- end table -->", "optimizer_quality.csv"),
        ("by <!-- figure: muonsn8_gain -->0<!-- end -->", "optimizer_quality_summary.csv"),
        ("by <!-- figure: short_step -->0<!-- end -->", "attention_gpu.csv"),  # a median of nothing
        ("<!-- table: gpu_prefill -->\n<!-- end table -->", "attention_gpu.csv"),
    ],
)
def test_results_without_the_rows_asked_for_are_one_clear_line(tmp_path, block, file):
    (tmp_path / file).write_text("setup,iterations,variant,seed,name\nseed,2000,adamsn,1,other\n")
    with pytest.raises(UserError, match=f"needs rows or columns that .*{file} lacks"):
        write_tables.rewrite(block, tmp_path)


@pytest.mark.slow
def test_every_registered_table_can_be_made_from_the_committed_results():
    for name, (_, files) in TABLES.items():
        text = f"<!-- table: {name} -->\n<!-- end table -->"
        made = write_tables.rewrite(text, RESULTS)
        # heading, rule, a row at least; or what a command printed
        assert made.count("\n|") >= 3 or made.count("\n```") >= 2, (name, files)


def test_every_commit_of_a_table_is_named():
    rows = [dict(machine="m", torch="2.11", commit=commit) for commit in ("a1", "b2", "a1")]
    assert made_on(rows) == "\n\nm; torch 2.11; commits a1, b2."
    assert made_on(rows[:1]) == "\n\nm; torch 2.11; commit a1."


def test_names_of_optimizers_can_be_broken_at_spaces():
    assert label("muonsn8") == "`muonsn8`" and label(PUBLISHED) == "AdamSN as published"
    named = label("adam:role_rates={'mlp_in':2.0,'mlp_out':0.125}+betas=(0.7,0.99)")
    assert named == "`adam`, role_rates mlp_in 2.0 mlp_out 0.125, betas 0.7 0.99"
    assert label("adamsn:role_rates={}") == "`adamsn`, role_rates none"


def test_a_card_holds_a_peak_and_a_reserve():
    assert fitting(3.9e9) == 4 and fitting(4.1e9) == 8 and fitting(79.6e9) == 80
    with pytest.raises(LookupError):
        fitting(86e9)


def test_the_table_of_momenta_knows_the_default():
    default = VARIANTS["adamsn"].options
    assert optimizer_tables.DEFAULT_MOMENTUM == (default["betas"][0], default["nu1"])


@pytest.mark.slow
def test_the_pictures_agree_with_the_committed_results(tmp_path):
    pages = "".join((ROOT / name).read_text() for name in write_tables.PAGES)
    for name, (_, *files) in draw_pictures.PICTURES.items():
        picture = ROOT / "docs" / "pictures" / name
        assert f"pictures/{name})" in pages and draw_pictures.is_fresh(picture)
        for file in files:
            copy = tmp_path / name
            copy.write_text(picture.read_text().replace(file, "other.csv"))
            assert not draw_pictures.is_fresh(copy)
        draw_pictures.draw(copy)
        assert draw_pictures.is_fresh(copy)


def test_no_optimizer_is_left_out_of_the_picture():
    rows = read_csv(RESULTS / "optimizer_quality_summary.csv")
    drawn = draw_pictures.PICTURES["optimizers.svg"][0](rows)
    for axis, (setup, iterations, _) in zip(drawn.axes, PANELS):
        compared = optimizer_tables.compared(rows, setup, iterations)
        low, high = axis.get_ylim()
        assert len(axis.containers) == len(compared) >= 15
        assert all(low < row["val_loss"] < high for row in compared)
    legend = {text.get_text() for text in drawn.legends[0].get_texts()}
    assert len(legend) == len(LOOK) and {"muonsn8", "APOLLO-Mini", "torch Adafactor"} <= legend


@pytest.mark.slow
def test_pictures_are_drawn_whenever_asked_and_only_checked_with_check(tmp_path):
    def script(*flags):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "experiments.report.draw_pictures",
                f"--folder={tmp_path}",
                *flags,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    assert script("--check=True").returncode == 1 and not list(tmp_path.iterdir())
    assert script().returncode == 0 and script("--check=True").returncode == 0
    picture = tmp_path / "optimizers.svg"
    drawn = picture.read_bytes()
    picture.write_bytes(drawn + b"<!-- by older code -->")
    assert script().returncode == 0 and picture.read_bytes() == drawn


@pytest.mark.slow
@pytest.mark.parametrize("name", write_tables.PAGES)
def test_the_pages_agree_with_the_committed_results(name):
    text = (ROOT / name).read_text()
    assert "<!-- table:" in text
    made = write_tables.rewrite(text, RESULTS)
    if name == "docs/ARCHITECTURE.md":  # every file, whatever its first line has become since
        text, made = (re.findall(r"^\| `(\S+\.py)`", page, re.MULTILINE) for page in (text, made))
        assert len(made) > 40
    assert made == text, "run make tables"
