"""The tables of docs/ARCHITECTURE.md: who imports whom, and what every file says it is."""

import ast
import re

from experiments.report.table_tools import markdown, table
from experiments.shared.common import ROOT

FLOORS = (  # folders of the package, lowest first; others follow by name
    *("system", "attention", "layers", "optim", "text"),
    *("decoding", "weights", "memory", "parallel", "int4", "training"),
)
LONGEST = 130  # characters of what a file says


def summary(path):
    """The first sentence of a Python file's docstring, without its full stop. '' for none."""
    words = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(words.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z0-9)`])[.;] ", paragraph + " ")[0].rstrip(".: ")
    if len(sentence) > LONGEST:
        sentence = sentence[:LONGEST].rsplit(" ", 1)[0].rstrip(",:(") + " …"
    return sentence.replace("|", "/")


def folders():
    """Folders of the package, the lowest floor first."""
    found = [path for path in (ROOT / "leangpt").iterdir() if (path / "__init__.py").exists()]
    place = {name: number for number, name in enumerate(FLOORS)}
    return sorted(found, key=lambda path: (place.get(path.name, len(place)), path.name))


def imported(path):
    """Folders of the package that a Python file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith("leangpt."))


@table("imports")
def imports():
    """A line per folder, the highest floor first: the folders it imports from."""
    lines = []
    for folder in reversed(folders()):
        names = {name for path in folder.rglob("*.py") for name in imported(path)} - {folder.name}
        order = [path.name for path in folders() if path.name in names]
        lines.append([f"`{folder.name}`", ", ".join(order) or "nothing of ours"])
    return markdown(["folder", "imports"], lines, words=2)


@table("files")
def files():
    """A line per file, folder by folder, the lowest floor first."""
    lines = [
        [f"`{path.relative_to(ROOT)}`", summary(path)]
        for folder in folders()
        for path in sorted(folder.rglob("*.py"))
        if path.name != "__init__.py"
    ]
    return markdown(["file", "what it is"], lines, words=2)
