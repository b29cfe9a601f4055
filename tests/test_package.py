"""`pip install` of this checkout, or of its wheel, as an outsider has it: in a fresh virtual
environment, used in a folder whose own modules have the names that ours once had."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv

import pytest
from conftest import ROOT

FOREIGN = ("model", "optimizers", "errors", "memory", "loss", "adamsn", "tiled", "dataset", "train")
CODE = """
import sys, torch, leangpt
from leangpt.optim import build_optimizer, AdamSN, Adafactor, MuonSN
from leangpt.layers import chunked_cross_entropy
from leangpt.layers import linear_cpu
from leangpt.optim.kernels import step_cpu
from leangpt.attention import tile_layers
assert leangpt.__file__.startswith(sys.prefix), leangpt.__file__
assert step_cpu.SOURCE.exists() and linear_cpu.SOURCE.exists()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(11, 64), torch.nn.Linear(64, 64))
head = torch.nn.Linear(64, 11, bias=False)
idx = torch.randint(11, (8, 5))
losses = []
optimizer = build_optimizer(torch.nn.Sequential(model, head), "muonsn8")
for _ in range(20):
    loss = chunked_cross_entropy(model(idx), head.weight, idx)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
assert losses[-1] < 0.5 * losses[0], losses
for cls in (AdamSN, Adafactor, MuonSN):
    cls(head.parameters(), lr=1e-3)
ours = {name for name in sys.modules if name in %r}
assert not ours, ours
print("fine")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function kind -> the Python of a fresh virtual environment with leangpt in it.

    Nothing is downloaded: the environment sees this one's other packages.
    """
    pytest.importorskip("setuptools", minversion="77")

    def install(kind):
        folder = tmp_path_factory.mktemp(kind)
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        bin, site = folder / "venv" / "bin", next((folder / "venv").glob("lib/*/site-packages"))
        (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        source = folder / "checkout"  # the tracked files: building leaves traces in a folder
        files = subprocess.run(
            ["git", "ls-files", "leangpt", "pyproject.toml", "README.md", "LICENSE"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for name in files:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
        pip = [bin / "python", "-m", "pip", "--disable-pip-version-check"]
        quiet = ["--quiet", "--no-deps", "--no-build-isolation"]
        if kind == "wheel":
            wheels = ["wheel", *quiet, "--wheel-dir", folder, source]
            subprocess.run([*pip, *wheels], check=True, capture_output=True)
            source = next(folder.glob("*.whl"))
        subprocess.run([*pip, "install", *quiet, source], check=True, capture_output=True)
        return bin / "python"

    return install


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("checkout", "wheel"))
def test_installed_it_works_beside_modules_of_the_same_names(installed, kind, tmp_path):
    for name in FOREIGN:
        (tmp_path / f"{name}.py").write_text("raise ImportError('a module of somebody else')\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["LEANGPT_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        [installed(kind), "-c", CODE % (FOREIGN,)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "fine\n" and done.returncode == 0, done.stderr


def test_requirements_are_the_extras_that_the_scripts_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["text"], *extras["weights"], *extras["scripts"]]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [re.sub(r"\s*#.*", "", line) for line in lines]
    assert sorted(filter(None, listed)) == sorted(wanted)


def test_python_is_new_enough():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11" and sys.version_info >= (3, 11)
