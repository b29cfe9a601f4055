"""williams.ipynb runs from top to bottom, stores what it drew, and can do without widgets."""

import json
import time
from types import SimpleNamespace

import matplotlib
import nbformat
import pytest
from conftest import ROOT
from matplotlib.figure import Figure

from experiments.report import attention_plots, run_notebook
from experiments.shared.common import RESULTS, read_csv

matplotlib.use("agg")
PATH = ROOT / "williams.ipynb"


def outputs(notebook):
    return [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]


@pytest.mark.slow
def test_it_runs_in_under_a_minute_and_draws_its_figures():
    notebook = nbformat.read(PATH, as_version=4)
    start = time.perf_counter()
    # now and then the client sleeps through a cell's reply until this timeout, and finds it then
    run_notebook.run(notebook, timeout=25)
    assert time.perf_counter() - start < 60
    images = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(images) >= 6
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


def test_the_stored_outputs_are_complete_and_static():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "run experiments/report/run_notebook.py"
    assert "widgets" not in notebook.metadata
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 6
    (picker,) = [cell for cell in code if "policy_picker" in cell.source]
    assert ["image/png" in output.data for output in picker.outputs] == [True]
    first_row = read_csv(RESULTS / "attention_scaling.csv")[0]
    assert first_row["machine"] in json.dumps(outputs(notebook)), "outputs are of other results"


def test_it_opens_with_what_it_shows_and_ends_with_the_theorem():
    cells = nbformat.read(PATH, as_version=4).cells
    assert all(word in cells[0].source for word in ("bars", "Optimizers", "Attention"))
    last = " ".join(cells[-1].source.split())
    assert "2502.17779" in last and "It says nothing about transformers" in last
    assert not any("theorem" in cell.source for cell in cells[1:15])


@pytest.fixture
def rows():
    return read_csv(RESULTS / "attention_scaling.csv")


@pytest.fixture
def shown(monkeypatch):
    """What policy_picker displays, in order; an update is one more."""
    found = []

    def display(thing, display_id=None):
        found.append(thing)
        return SimpleNamespace(update=found.append)

    monkeypatch.setattr(attention_plots, "display", display)
    return found


def test_the_picker_redraws_for_the_chosen_policies(rows, shown):
    _, controls = attention_plots.policy_picker(rows)
    assert shown[0] is controls and isinstance(shown[1], Figure)
    mode, policies = controls.children
    assert set(mode.options) == {"forward", "forward+backward"}
    assert "recompute" in policies.options and policies.value == policies.options
    policies.value = ("plain", "recompute")
    assert len(shown) == 3 and len(shown[2].axes[2].lines) == 2
    mode.value = "forward+backward"
    assert "forward+backward" in shown[3]._suptitle.get_text()


def test_without_ipywidgets_the_picker_is_a_figure(rows, shown, monkeypatch):
    monkeypatch.setattr(attention_plots, "ipywidgets", None)
    _, controls = attention_plots.policy_picker(rows)
    assert controls is None and len(shown) == 1 and isinstance(shown[0], Figure)


def test_a_figure_has_a_line_for_each_policy_asked_for(rows):
    figure = attention_plots.scaling_figure(rows, "forward", ["plain", "recompute"])
    time, ratio, peak = figure.axes
    assert [line.get_label() for line in peak.lines] == ["plain", "recompute"]
    assert peak.get_yscale() == "log" and time.get_xscale() == "log"
    assert set(ratio.lines[0].get_ydata()) == {1.0}  # plain over itself
