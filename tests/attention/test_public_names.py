"""`import leangpt.attention` is cheap, and hands out what it names."""

import subprocess
import sys

import pytest
from conftest import ROOT

import leangpt.attention

CODE = """
import sys
import leangpt.attention
loaded = {name for name in sys.modules if name.startswith("leangpt.attention.") or name == "torch"}
assert not loaded, loaded
from leangpt.attention import attend, tile_layers
assert "transformers" not in sys.modules and "leangpt.kv_cache.cache" not in sys.modules
"""


@pytest.mark.slow
def test_importing_the_package_loads_none_of_it():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there():
    for name in leangpt.attention.__all__:
        assert getattr(leangpt.attention, name).__name__ == name
