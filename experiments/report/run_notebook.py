"""Run williams.ipynb from top to bottom and store its outputs in it.

  python -m experiments.report.run_notebook

What is stored renders without a kernel: live widgets, which would be dead there, are left out;
so are the execution times, so that the file changes only when a result does.
"""

from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

from configurator import parse_config
from experiments.shared.common import ROOT
from leangpt.system.errors import UserError, exit_cleanly

WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass
class Settings:
    notebook: str = str(ROOT / "williams.ipynb")  # the notebook to run
    out: str | None = None  # where to store it; None: in its place
    timeout: int = 120  # seconds a cell may take


def run(notebook, timeout):
    """Execute `notebook` (a NotebookNode) with the repository's root as working directory."""
    pipes = Config(KernelManager={"transport": "ipc"})  # no ports opened for a batch run
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT)}},
        config=pipes,
    ).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if WIDGET not in output.get("data", {})
            ]
    return notebook


def main():
    settings, _ = parse_config(Settings)
    source = Path(settings.notebook)
    if not source.exists():
        raise UserError(f"no notebook {source}")
    notebook = run(nbformat.read(source, as_version=4), settings.timeout)
    out = Path(settings.out or source)
    temporary = out.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(out)
    print(f"ran {len(notebook.cells)} cells, outputs stored in {out}")


if __name__ == "__main__":
    exit_cleanly(main)
