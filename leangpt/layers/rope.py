"""Rotary position embeddings (RoPE): angle tables, and the rotation of queries and keys.

Su et al. 2021, "RoFormer" (arXiv 2104.09864), equation 34, in the rotate-half form of the Llama
family: number i of a head is paired with number i + D/2, and the pair is turned by the angle
position * theta^(-2i/D). The scaling rules stretch those frequencies for longer contexts.
"""

import math

import torch

from leangpt.system.errors import UserError

# Keys each scaling rule needs beside its name; the names are those of Hugging Face's config.json.
SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "factors": (),
}


def check_scaling(scaling):
    """Return the name of a `rope_scaling` dict's rule; UserError if it is not usable."""
    if scaling is None:
        return "default"
    if not isinstance(scaling, dict):
        raise UserError(f"rope_scaling must be None or a dict, not {scaling!r}")
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(name, str) or name not in SCALING_KEYS:
        known = ", ".join(SCALING_KEYS)
        raise UserError(f"rope_scaling type {name!r} is not supported; the known types: {known}")
    for key in SCALING_KEYS[name]:
        value = scaling.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UserError(f"rope_scaling {name!r} needs a positive {key!r}, not {value!r}")
    if name == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        raise UserError("rope_scaling 'llama3' needs high_freq_factor above low_freq_factor")
    factors = scaling.get("factors")
    if name == "factors" and not (
        isinstance(factors, list)
        and factors
        and all(type(f) in (int, float) and 0 < f < math.inf for f in factors)
    ):
        raise UserError("rope_scaling 'factors' needs a list of positive 'factors', one a pair")
    return name


def rope_frequencies(head_dim, theta=10000.0, scaling=None, device=None):
    """Angle per position of each pair of a head: (D/2,) float32, radians per token.

    `scaling` is None or the `rope_scaling` dict of a Hugging Face config.json:
      linear  every frequency divided by `factor` (Chen et al. 2023, arXiv 2306.15595);
      llama3  wavelengths beyond original_max_position_embeddings / low_freq_factor divided by
              `factor`, those below original_max_position_embeddings / high_freq_factor left
              alone, a straight blend between (Llama 3.1's reference code);
      factors  pair i divided by `factors`[i]: how GGUF files write llama3 down (not HF's).
    Raises UserError for an odd head_dim, a theta that is not positive, or another scaling rule.
    """
    if head_dim % 2:
        raise UserError(f"rope needs an even head dimension, not {head_dim}")
    if not theta > 0:
        raise UserError(f"rope_theta must be positive, not {theta!r}")
    name = check_scaling(scaling)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequency = 1.0 / (theta**exponent)
    if name == "linear":
        return frequency / scaling["factor"]
    if name == "llama3":
        # turns: how often the pair goes round within the context the model was first trained on
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / scaling["factor"]
    if name == "factors":
        if len(scaling["factors"]) != head_dim // 2:
            raise UserError(
                f"rope_scaling has {len(scaling['factors'])} factors for a head of "
                f"{head_dim // 2} pairs"
            )
        return frequency / torch.tensor(scaling["factors"], device=device)
    return frequency


def rope_table(head_dim, positions, theta=10000.0, scaling=None):
    """cos and sin of every angle, each (T, D/2) float32 on the device of `positions` (T,) int64.

    The products are float32, as the models' own code has them: at position 100,000 they are
    exact to about 0.004 radians, and pretrained weights expect just these angles.
    """
    frequency = rope_frequencies(head_dim, theta, scaling, device=positions.device)
    angles = positions.to(torch.float32)[:, None] * frequency  # (T, D/2)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Turn x (B, H, T, D) by the tables (T, D/2); same shape and dtype as x.

    Computed in float32, or in float64 where x is float64.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    first, second = x.to(dtype).chunk(2, dim=-1)  # (B, H, T, D/2) each
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
