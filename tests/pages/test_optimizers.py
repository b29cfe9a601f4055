"""optimizers.py: what a run's settings ask for, and the variants as a reader sees them."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from leangpt.optim import VARIANTS
from leangpt.system.errors import UserError
from optimizers import check_option_types, variant_table


def test_options_as_text_have_the_type_of_their_default():
    check_option_types("adafactor", dict(embedding_factored=False, embedding_momentum=0.9))
    check_option_types("adamsn", dict(embedding_beta1=0.8, nu1=1, partition={"qkv": 8}))
    with pytest.raises(UserError, match="embedding_factored=no should be bool"):
        check_option_types("adafactor", dict(embedding_factored="no"))
    with pytest.raises(UserError, match="momentum_bits=8.0 should be int"):
        check_option_types("muonsn", dict(momentum_bits=8.0))


@pytest.mark.slow
def test_the_variants_and_their_rates_are_printed():
    text = subprocess.run(
        [sys.executable, "optimizers.py"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert text == variant_table() + "\n" and max(map(len, text.splitlines())) <= 100
    found = dict(re.findall(r"^(\w+) +([0-9.]+ +[0-9.]+)  ", text, re.M))
    for name, variant in VARIANTS.items():
        rates = [float(rate) for rate in found[name].split()]
        assert rates == [variant.learning_rate, variant.embedding_lr]
        for option in variant.options:
            assert f"{option}=" in text
