"""What torch.load makes of a file, held against the file's size before anybody works with it.

A few hundred bytes can announce anything: a list that holds one list twice, which holds one twice,
and so on, prints for ever; a tensor may repeat its only number a million million times; a
compressed entry unpacks to a thousand times itself. torch.save writes none of that.
"""

import zipfile
from pathlib import Path

import torch

DEEPEST = 64  # containers in one another
COPIES = 2  # names of the same numbers: tied weights


FOLDER = 0x10  # of an entry's attributes, as MS-DOS has them


def check_zip(path: Path, tensors: bool = True) -> None:
    """Raise BadZipFile where an entry of the file is not what was written: torch does not look.

    tensors: their entries too, 0.2 s for 200 MB. Files that are no zip, as torch wrote them before
    version 1.6, have no checksums.
    """
    if not is_zip(path):
        return
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise zipfile.BadZipFile("its entries are larger than itself")
        for entry in entries:
            if entry.external_attr & FOLDER and not entry.is_dir():
                # torch reads nothing of a folder, and gives out what its memory held before
                raise zipfile.BadZipFile(f"its entry {entry.filename} is called a folder")
            if tensors or "/data/" not in entry.filename:
                with file.open(entry) as content:
                    while content.read(1 << 20):
                        pass


def is_zip(path: Path) -> bool:
    """Does this file begin as those of torch.save since version 1.6?"""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def check_bounds(value, size: int) -> None:
    """Raise ValueError where nested dicts, lists and tensors, read from a file of `size` bytes,
    hold more than such a file can, or numbers that 64 bits do not."""
    waiting, things, tensor_bytes = [(value, 0)], 0, 0
    while waiting:
        item, depth = waiting.pop()
        things += 1
        if things > size or depth > DEEPEST:
            raise ValueError("it holds itself, again and again")
        if isinstance(item, dict):
            waiting += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += [(part, depth + 1) for part in item]
        elif torch.is_tensor(item):
            if item.layout != torch.strided or item.is_meta:
                raise ValueError("a tensor lacks numbers")
            tensor_bytes += item.numel() * item.element_size()
        elif isinstance(item, int) and item.bit_length() > 64:
            raise ValueError("a number has more than 64 bits")
    if tensor_bytes > COPIES * size:
        raise ValueError(f"tensors of {tensor_bytes:,} bytes are announced, and it has {size:,}")
