"""Where built kernels and downloaded files are kept between runs."""

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout's, or what the package is installed in


def cache_folder():
    """The folder of everything that can be made again, which may not exist yet -> Path.

    $LEANGPT_CACHE where that is set; .cache in the checkout that this package runs from; otherwise
    leangpt in the user's own cache folder, $XDG_CACHE_HOME or ~/.cache.
    """
    if told := os.environ.get("LEANGPT_CACHE"):
        return Path(told).expanduser()
    if runs_from_checkout():
        return ROOT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leangpt"


def runs_from_checkout():
    """Does this package lie beside a pyproject.toml of its own name, as in a clone?"""
    try:
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or none that can be read
        return False
    return settings.get("project", {}).get("name") == "leangpt"
