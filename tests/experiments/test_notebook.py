"""williams.ipynb runs from top to bottom, stores what it drew, and can do without widgets."""

import json
import sys
import time

import ipywidgets
import matplotlib
import nbformat
import pytest
from conftest import ROOT
from matplotlib.figure import Figure

from experiments.report import run_notebook
from experiments.shared.common import RESULTS, read_csv

matplotlib.use("agg")
PATH = ROOT / "williams.ipynb"


def outputs(notebook):
    return [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]


def test_it_runs_in_under_a_minute_and_draws_its_figures():
    notebook = nbformat.read(PATH, as_version=4)
    start = time.perf_counter()
    # now and then the client sleeps through a cell's reply until this timeout, and finds it then
    run_notebook.run(notebook, timeout=25)
    assert time.perf_counter() - start < 60
    images = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(images) >= 3
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


def test_the_stored_outputs_are_complete_and_static():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "run experiments/report/run_notebook.py"
    assert "widgets" not in notebook.metadata
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 3
    first_row = read_csv(RESULTS / "attention_scaling.csv")[0]
    assert first_row["machine"] in json.dumps(outputs(notebook)), "outputs are of other results"


def test_it_does_not_claim_the_theorem():
    text = " ".join(PATH.read_text().split())
    assert "2502.17779" in text and "It says nothing about transformers" in text


@pytest.fixture
def rows():
    return read_csv(RESULTS / "attention_scaling.csv")


def test_the_picker_redraws_for_the_chosen_policies(rows):
    from experiments.report.attention_plots import policy_picker

    picker = policy_picker(rows)
    assert isinstance(picker, ipywidgets.interactive)
    mode, policies, _ = picker.children
    assert set(mode.options) == {"forward", "forward+backward"}
    assert "recompute" in policies.options and policies.value == policies.options


def test_without_ipywidgets_the_picker_is_a_figure(rows, monkeypatch):
    from experiments.report.attention_plots import policy_picker

    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # import fails
    assert isinstance(policy_picker(rows), Figure)


def test_a_figure_has_a_line_for_each_policy_asked_for(rows):
    from experiments.report.attention_plots import scaling_figure

    figure = scaling_figure(rows, "forward", ["plain", "recompute"])
    time, ratio, peak = figure.axes
    assert [line.get_label() for line in peak.lines] == ["plain", "recompute"]
    assert peak.get_yscale() == "log" and time.get_xscale() == "log"
    assert set(ratio.lines[0].get_ydata()) == {1.0}  # plain over itself
