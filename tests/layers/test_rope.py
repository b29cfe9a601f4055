"""RoPE: the rotation's own laws, and the scaling rules against hand-worked numbers."""

import math

import pytest
import torch

from leangpt.layers.rope import apply_rope, rope_frequencies, rope_table
from leangpt.system.errors import UserError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        a = apply_rope(q, *rope_table(16, torch.tensor([i])))
        b = apply_rope(k, *rope_table(16, torch.tensor([j])))
        return (a * b).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-4, rtol=0)
    assert (score(7, 3) - score(7, 2)).abs() > 1e-3


def test_position_zero_is_identity_and_norm_is_kept():
    x = torch.randn(2, 3, 5, 8)
    y = apply_rope(x, *rope_table(8, torch.arange(5)))
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_pairs_are_halves_apart():
    # rotate-half: number 0 pairs with number D/2, and the first pair turns one radian a token
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    y = apply_rope(x, *rope_table(4, torch.tensor([1]))).flatten()
    expected = torch.tensor([math.cos(1), 0.0, math.sin(1), 0.0])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.randn(1, 2, 3, 8, dtype=dtype)
    assert apply_rope(x, *rope_table(8, torch.arange(3))).dtype == dtype


def test_linear_scaling_divides_positions():
    stretched = rope_table(8, torch.arange(12), scaling={"type": "linear", "factor": 4.0})
    plain = rope_table(8, torch.arange(3))
    torch.testing.assert_close(stretched[0][::4], plain[0])


def test_llama3_scaling():
    plain = rope_frequencies(128, 500000.0)
    scaled = rope_frequencies(128, 500000.0, LLAMA3)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192 / 1
    assert short.any() and long.any() and (~short & ~long).any()
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


def test_factors_divide_each_pair():
    scaled = rope_frequencies(8, scaling={"rope_type": "factors", "factors": [1, 1, 2.0, 4]})
    torch.testing.assert_close(rope_frequencies(8) / scaled, torch.tensor([1.0, 1, 2, 4]))


@pytest.mark.parametrize(
    "scaling, words",
    [
        ({"rope_type": "yarn", "factor": 4.0}, "yarn"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": -2}, "factor"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
        ("linear", "dict"),
        ({"rope_type": "factors", "factors": [1, 1, 0, 1]}, "positive"),
        ({"rope_type": "factors", "factors": [1, 1]}, "2 factors"),
    ],
)
def test_bad_scaling_is_named(scaling, words):
    with pytest.raises(UserError, match=words):
        rope_frequencies(8, scaling=scaling)


def test_bad_head_dim():
    with pytest.raises(UserError, match="even"):
        rope_frequencies(7)
