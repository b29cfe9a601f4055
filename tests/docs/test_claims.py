"""What the front page says in words and code: its Python runs, its commands and flags exist."""

import re
import shlex
import tomllib
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

import bench
import sample
import train
from configurator import parse_config
from experiments.report.front_tables import USABLE
from leangpt.attention.tile_sizes import tile_sizes
from leangpt.memory.search import CONTEXT, RESERVE
from leangpt.optim import VARIANTS
from model import GPTConfig

README = (ROOT / "README.md").read_text()


def fenced(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_python_runs():
    torch.manual_seed(0)
    transformers = pytest.importorskip("transformers")
    shape = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, vocab_size=50)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, intermediate_size=64))
    idx = torch.randint(50, (1, 12))
    before = llama(idx, labels=idx).loss
    model = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 32))
    hidden, targets = torch.randn(2, 5, 32, requires_grad=True), torch.randint(50, (2, 5))
    names = dict(
        llama=llama, model=model, head=torch.nn.Linear(32, 50), hidden=hidden, targets=targets,
        config=GPTConfig(),
    )  # fmt: skip
    (code,) = fenced("python")
    exec(code, names)
    assert isinstance(names["optimizer"], torch.optim.Optimizer)
    held = {id(p) for group in names["optimizer"].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    logits = hidden @ names["head"].weight.T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert llama(idx, labels=idx).loss.item() == pytest.approx(before.item(), rel=1e-5)
    assert names["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert parse_config(train.Settings, names["flags"].split())[1]


def test_commands_name_files_that_exist():
    lines = [line for block in fenced("") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("python ") and ".py" in line]
    assert len(commands) >= 4
    for command in commands:
        for word in shlex.split(command, comments=True):
            if word.endswith(".py"):
                assert (ROOT / word).exists(), command


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake (\w+)(?=`|\s+#|:)", README))
    assert {"demo", "test", "check", "chat", "tables"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_flags_are_settings_of_a_script():
    known = {field.name for page in (train, sample, bench) for field in fields(page.Settings)}
    known |= {"help", "input", "name", "tokenizer", "standalone", "nproc_per_node"}
    named = set(re.findall(r"--([a-z_]+)", README))
    assert named <= known, named - known
    knobs = README.partition("<!-- table: which_knob")[2].partition("<!-- end")[0]
    for line in knobs.splitlines():
        if found := re.search(r"→ `(\w+)`", line):
            assert found[1] in known, line


def test_optimizers_are_variants():
    table = README.partition("<!-- table: front_optimizers")[2].partition("<!-- end")[0]
    named = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert len(named) == 6 and set(named) <= set(VARIANTS)


def test_what_stays_free_of_a_card():
    page = (ROOT / "docs/results/plan.md").read_text()
    assert f"({1 - USABLE:.0%} of it stays free)" in page
    assert f"{RESERVE['cuda']:.0%} of a GPU, {RESERVE['cpu']:.0%} of a CPU's memory" in page
    assert f"{CONTEXT // 10**6} MB of a GPU are counted as CUDA's own" in page


def test_below_which_length_tiles_do_nothing():
    (cuda, cpu) = (
        int(number.replace(",", ""))
        for number in re.search(r"below ([\d,]+) tokens \(CPU: ([\d,]+)\)", README).groups()
    )
    for device, length in (("cuda", cuda), ("cpu", cpu)):
        gpt2 = GPTConfig(block_size=1 << 17, attention_policy="recompute")
        assert tile_sizes(gpt2, length, device, training=True) is None
        assert tile_sizes(gpt2, length + 1, device, training=True) is not None


def test_versions_agree():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = pyproject["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "docs" / "CHANGELOG.md").read_text()
    tests = pyproject["project"]["optional-dependencies"]["tests"]
    (ruff,) = [need for need in tests if need.startswith("ruff")]
    oldest = re.search(r">=([\d.]+)", ruff)[1]  # what formats at a commit formats in make check
    assert f"rev: v{oldest}." in (ROOT / ".pre-commit-config.yaml").read_text()
