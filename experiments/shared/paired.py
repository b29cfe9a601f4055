"""Means with confidence intervals and paired tests, from Student's t, in a few lines of NumPy."""

import math

import numpy as np


def mean_interval(values, confidence=0.95):
    """(mean, half width of the confidence interval) of independent values; nan width for one."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()), t_quantile(0.5 + confidence / 2, len(values) - 1) * error


def paired_difference(values, reference):
    """(mean difference, half width at 95%, two-sided p) of values[i] - reference[i]."""
    difference = [a - b for a, b in zip(values, reference, strict=True)]
    mean, half = mean_interval(difference)
    if len(difference) < 2:
        return mean, half, math.nan
    error = half / t_quantile(0.975, len(difference) - 1)
    if error == 0:
        return mean, half, 1.0 if mean == 0 else 0.0
    return mean, half, 2 * (1 - t_distribution(abs(mean) / error, len(difference) - 1))


def t_distribution(t, freedom):
    """P(T <= t) for Student's t: Simpson's rule on the density, substituting x = tan(angle)."""
    n = 2000
    angles = np.linspace(0, math.atan(abs(t) / math.sqrt(freedom)), n + 1)
    density = np.cos(angles) ** (freedom - 1)  # of the angle, up to a constant
    weights = np.full_like(angles, 2.0)
    weights[1::2] = 4.0
    weights[[0, -1]] = 1.0
    area = float((density * weights).sum() * (angles[1] - angles[0])) / 3
    log_constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    half = area * math.exp(log_constant) / math.sqrt(math.pi)
    return 0.5 + math.copysign(half, t)


def t_quantile(probability, freedom):
    """The t with P(T <= t) = probability, by bisection."""
    low, high = -1e3, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if t_distribution(middle, freedom) < probability else (low, middle)
        )
    return (low + high) / 2
