"""Near-copies of files, found by the runs of three lines that they share.

A shingle is three consecutive lines that are not blank, without the space around them, hashed to
64 bits; a notice of copyright or licence at a file's head does not count. Two questions are asked
of a file's shingles: what share of them has been kept already (in memory that does not grow), and
does a validation file have so many of them that one is a near-copy of the other?
"""

import re
from zlib import crc32

import numpy as np

SEEN_SHARE = 0.5  # of a file's shingles kept already: it is a near-copy of what is kept
NEAR_SHARE = 0.3  # of the smaller file's shingles also in the other: near, where one validates
NOTICE = re.compile(
    rb"\s*(/\*.*?\*/|\(\*.*?\*\)|\{.*?\}|((//|#|--|;+|!|%+|dnl\b)[^\n]*\n)+)", re.DOTALL
)
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


def shingles(text):
    """The different shingles of a file (bytes) -> sorted (N,) uint64; N is 0 below three lines."""
    lines = filter(None, map(bytes.strip, _without_notice(text).split(b"\n")))
    codes = np.fromiter(map(crc32, lines), dtype=np.uint64)
    if len(codes) < 3:
        return np.zeros(0, dtype=np.uint64)
    mixed = codes[:-2] * MIX[0] + codes[1:-1] * MIX[1] + codes[2:] * MIX[2]
    return np.unique(mixed ^ (mixed >> np.uint64(29)))


def _without_notice(text):
    for _ in range(3):  # one line that names the licence, one block of it, one of authors
        match = NOTICE.match(text)
        if match is None or not re.search(rb"opyright|icense|SPDX", match[0]):
            break
        text = text[match.end() :]
    return text


class Seen:
    """The shingles of all files kept so far, as a Bloom filter of 2**bits bits (128 MiB).

    Two bits a shingle: at 25M shingles one in 500 that is new looks seen.
    """

    def __init__(self, bits=30):
        self.mask = np.uint64((1 << bits) - 1)
        self.bits = np.zeros(1 << (bits - 3), dtype=np.uint8)

    def _places(self, shingles):
        for shift in (0, 32):
            place = (shingles * MIX[0] >> np.uint64(shift)) & self.mask
            yield place >> np.uint64(3), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)

    def share(self, shingles):
        """The part of `shingles` (N > 0) that was added before, about: a float from 0 to 1."""
        hits = True
        for byte, bit in self._places(shingles):
            hits = hits & ((self.bits[byte] & bit) != 0)
        return float(np.mean(hits))

    def add(self, shingles):
        """Remember these."""
        for byte, bit in self._places(shingles):
            np.bitwise_or.at(self.bits, byte, bit)


class Validation:
    """The shingles of the validation files, each with the files that have it."""

    def __init__(self, files):
        """files: a list of each file's shingles."""
        files = files or [np.zeros(0, dtype=np.uint64)]
        self.sizes = np.array([len(each) for each in files])
        owners = np.repeat(np.arange(len(files)), self.sizes)
        everything = np.concatenate(files)
        order = np.argsort(everything, kind="stable")
        self.shingles, self.owners = everything[order], owners[order]

    def near(self, shingles):
        """Does any validation file share NEAR_SHARE of the smaller one's shingles with these?"""
        first = np.searchsorted(self.shingles, shingles, side="left")
        last = np.searchsorted(self.shingles, shingles, side="right")
        hit = np.flatnonzero(last > first)
        if len(hit) == 0:
            return False
        owners = np.concatenate([self.owners[first[i] : last[i]] for i in hit])
        common = np.bincount(owners, minlength=len(self.sizes))
        return bool(
            np.any(common >= NEAR_SHARE * np.minimum(self.sizes, len(shingles)) + (common == 0))
        )
