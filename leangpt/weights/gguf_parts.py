"""A GGUF model cut into several files, as llama.cpp's gguf-split writes them.

Each part says `split.no` and `split.count`; they are called NAME-00001-of-00003.gguf and so on. The
first has all the metadata, each has some of the tensors. A part alone is no model.
"""

import re
from pathlib import Path

from leangpt.system.errors import UserError

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def part_paths(path) -> list[Path]:
    """The files of the model that `path` is a file of, in order: itself alone, or all its parts.

    By their names; check_parts holds that against what they say. Raises UserError for missing ones.
    """
    path = Path(path)
    name = PART.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name[3])
    parts = [path.with_name(f"{name[1]}-{i:05}-of-{name[3]}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        raise UserError(
            f"{path} is one of {count} parts of a model, and {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} missing: put all into one folder"
        )
    return parts


def check_parts(paths, metadata) -> None:
    """Raise UserError where the files are not the parts, in order, that they say they are.

    metadata: a dict for each file.
    """
    for number, (path, said) in enumerate(zip(paths, metadata)):
        count = said.get("split.count", 1)
        if (count or 1) == len(paths) and said.get("split.no", 0) == number:
            continue
        if len(paths) == 1:
            raise UserError(
                f"{path} is part {said.get('split.no', 0) + 1} of {count} of a model, and its name "
                f"does not say which the others are: call them NAME-00001-of-{count:05}.gguf and on"
            )
        raise UserError(
            f"{path} says that it is part {said.get('split.no', 0) + 1} of {count}, its name says "
            f"{number + 1} of {len(paths)}"
        )


def whole_models(paths) -> list[Path]:
    """Of a folder's GGUF files one for each model: of those in parts the first there is."""
    found = {}
    for path in sorted(paths):
        name = PART.fullmatch(path.name)
        found.setdefault((name[1], name[3]) if name else path.name, path)
    return list(found.values())
