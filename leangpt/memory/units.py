"""Bytes as people write them: 24GB in, 23.6 GB out."""

import re

from leangpt.system.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str, name: str = "memory") -> int:
    """ "24GB", "24 GiB", "512MB", "80e9" -> bytes. GB are 10^9, GiB 2^30. Raises UserError."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.I)
    try:
        number, prefix, binary = float(match[1]), match[2].upper(), match[3]
        size = number * (1024 ** "KMGT".index(prefix) * 1024 if binary else UNITS[prefix])
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name}={text}: write bytes as 24GB, 24GiB or 512MB") from None
    if not 2**10 <= size < 1e18:  # less is a number that lacks its unit
        raise UserError(f"{name}={text}: that is no memory; write bytes as 24GB, 24GiB or 512MB")
    return int(size)


def in_words(size: float) -> str:
    """Bytes as 23.6 GB, 512 MB or 40 KB (10^9, 10^6, 10^3)."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return (
                f"{size / unit:,.0f} {name}" if size >= 100 * unit else f"{size / unit:.3g} {name}"
            )
    return f"{size / 1e3:.0f} KB"
