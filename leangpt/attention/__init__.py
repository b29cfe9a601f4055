"""Exact attention and whole blocks in row tiles: memory that does not grow with every activation.

    from leangpt.attention import tile_layers

    tile_layers(model)                 # a Hugging Face Llama, Mistral or Qwen: trains as before

    from leangpt.attention import run_tiles     # a block of your own, that is a TileableBlock

Names are loaded when first asked for.
"""

import importlib

_HOME = {
    "HostStack": "offload",
    "RecomputedRows": "kv_source",
    "RowParts": "protocol",
    "StoredRows": "kv_source",
    "TileableBlock": "protocol",
    "attend": "kv_source",
    "run_tiles": "block_tiles",
    "tile_layers": "hf_layers",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
