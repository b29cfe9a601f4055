"""What decoding remembers of the past: rows a token, exact or of 8 or 4 bits, and their kernels."""

from leangpt.kv_cache.cache import KVCache, build_cache

__all__ = ["KVCache", "build_cache"]
