"""A GGUF file's announced counts held against its size, before a parser believes them.

Layout (llama.cpp's docs/gguf.md): "GGUF", version u32, tensors u64, pairs u64; for each pair a name
and a value; for each tensor its name, dimensions, type and offset. A name is a u64 length and
bytes; a value a u32 type and what it says, for an array a type, a u64 count and so many values. A
file of 93 bytes can announce an array of 2**60.
"""

import mmap
import struct

from leangpt.system.errors import UserError, refused
from leangpt.system.reading import regular_file

MAGIC = b"GGUF"
SIZES = (1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)  # bytes of a value, by type
STRING, ARRAY = 8, 9
LEAST = {STRING: 8, ARRAY: 12}  # bytes of an empty one
DEEPEST = 4  # arrays in arrays
DIMENSIONS = 4  # llama.cpp's most


def check_header(path):
    """Raise UserError where the file `path` is none of GGUF, or announces more than it can hold."""
    try:
        with open(regular_file(path), "rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                Header(data).walk()
    except OSError as error:
        raise refused(f"cannot read {path}", error) from None
    except (ValueError, struct.error) as error:  # mmap: an empty file is a ValueError
        raise UserError(f"{path}: not a GGUF file, or a part of one ({error})") from None


class Header:
    """A walk over a file's bytes. Raises ValueError or struct.error where they end too soon."""

    def __init__(self, data):
        self.data, self.at, self.order = data, len(MAGIC), "<"

    def walk(self):
        if self.data[: len(MAGIC)] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if self.number("I") & 0xFFFF == 0:  # the version, of the other byte order
            self.order = ">"
        tensors, pairs = self.number("Q"), self.number("Q")
        self.expect(tensors, 8 + 4 + 4 + 8, "tensors")
        self.expect(pairs, 8 + 4 + 1, "settings")
        for _ in range(pairs):
            self.string()
            self.value(self.number("I"))
        for _ in range(tensors):
            self.string()
            dimensions = self.number("I")
            if dimensions > DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self.skip(dimensions, 8)
            self.skip(1, 4 + 8)

    def value(self, kind, depth=0):
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind not in LEAST:
                return self.skip(count, self.size(kind))
            if depth == DEEPEST:
                raise ValueError("arrays in arrays in arrays")
            self.expect(count, LEAST[kind], "values of an array")
            for _ in range(count):
                self.value(kind, depth + 1)
        else:
            self.skip(1, self.size(kind))

    def size(self, kind):
        if kind >= len(SIZES):
            raise ValueError(f"a value of type {kind}")
        return SIZES[kind]

    def string(self):
        self.skip(self.number("Q"), 1)

    def number(self, code):
        (found,) = struct.unpack_from(self.order + code, self.data, self.at)
        self.at += struct.calcsize(code)
        return found

    def skip(self, count, size):
        self.expect(count, size, "values")
        self.at += count * size

    def expect(self, count, size, what):
        """Raise ValueError where `count` things of at least `size` bytes cannot follow."""
        left = len(self.data) - self.at
        if count * size > left:
            raise ValueError(f"{count} {what} are announced, and {left} bytes are left")
