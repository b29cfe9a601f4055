"""README's tables come from results/*.csv: rewritten where stale, refused where they cannot be."""

import subprocess
import sys

import pytest
from conftest import ROOT

from errors import UserError
from experiments import readme_tables
from experiments.common import write_csv

ROW = {"seq": 2048, "policy": "plain", "mode": "forward", "q_chunk": "", "k_chunk": "",
       "time_s": 1.5, "time_vs_plain": 1.0, "peak_MB": 416.0, "max_rel_err": 2e-7,
       "grad_rel_err": "", "machine": "a machine", "torch": "2.13", "commit": "abc"}
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
    write_csv(tmp_path / "results" / "attention_scaling.csv", [
        ROW, ROW | {"policy": "recompute", "time_s": 0.04, "time_vs_plain": 0.9, "peak_MB": 17.04},
        ROW | {"seq": 4096, "policy": "recompute", "time_vs_plain": ""}])
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "experiments/readme_tables.py", f"--readme={folder}/README.md",
         f"--results={folder}/results", *arguments], cwd=ROOT, text=True, capture_output=True)


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


def test_unknown_tables_and_missing_results_are_named(folder):
    with pytest.raises(UserError, match="a table 'nonsense'.*attention_forward"):
        readme_tables.rewrite("<!-- table: nonsense -->\n<!-- end table -->", folder / "results")
    with pytest.raises(UserError, match="attention_chunks.csv, which does not exist"):
        readme_tables.rewrite("<!-- table: attention_chunks -->\n<!-- end table -->",
                              folder / "results")
    (folder / "README.md").unlink()
    assert run(folder).returncode == 2


def test_every_registered_table_can_be_made_from_the_committed_results():
    for name, (_, file) in readme_tables.TABLES.items():
        if (ROOT / "results" / file).exists():
            text = f"<!-- table: {name} -->\n<!-- end table -->"
            made = readme_tables.rewrite(text, ROOT / "results")
            assert made.count("\n|") >= 3, name  # heading, rule, a row at least


@pytest.mark.parametrize("name", ("README.md", "docs/RESULTS.md"))
def test_the_pages_agree_with_the_committed_results(name):
    text = (ROOT / name).read_text()
    assert "<!-- table:" in text
    assert readme_tables.rewrite(text, ROOT / "results") == text
