"""What a run writes about itself; tests/pages/test_compare.py reads whole folders."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_run import make_dataset

from leangpt.runs.run import Run, groups, run_facts, same_data, write_facts
from leangpt.system.errors import UserError
from leangpt.text.dataset import load_dataset


@pytest.fixture
def facts(tmp_path):
    make_dataset(tmp_path)
    tied = torch.nn.Linear(3, 4, bias=False)
    model = torch.nn.ModuleList([tied, tied])
    runtime = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    return run_facts(model, 77, load_dataset("tiny", tmp_path), runtime)


def test_facts_say_what_no_setting_tells(facts, tmp_path):
    dataset = load_dataset("tiny", tmp_path)
    assert facts["parameters"] == 12 and facts["state_bytes"] == 77 and facts["processes"] == 2
    assert facts["dataset"] == {
        "name": "tiny",
        "sha256": dataset.sha256,
        "tokenizer": "char",
        "vocab_size": dataset.vocab_size,
        "train_tokens": len(dataset.train),
        "val_tokens": len(dataset.val),
        "source": "a rule",
    }
    assert facts["torch"] == torch.__version__ and facts["machine"]


def test_facts_are_written_as_json(facts, tmp_path):
    write_facts(tmp_path / "run", facts)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == facts
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_facts(tmp_path / "file" / "run", facts)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"name": "renamed"}, True),
        ({"sha256": "other"}, False),
        ({"val_tokens": 11}, False),
        ({"sha256": None}, True),  # recorded by one of them only, the names agree
        ({"sha256": None, "name": "renamed"}, False),
    ],
)
def test_the_same_data_by_what_both_have_recorded(change, same):
    data = {"name": "a", "sha256": "digest", "val_tokens": 10}
    runs = [Run("one", facts={"dataset": data}), Run("two", facts={"dataset": data | change})]
    assert same_data(*runs) == same_data(*reversed(runs)) == same
    assert len(groups(runs, same_data)) == 2 - same
