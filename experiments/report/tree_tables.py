"""The table of docs/ARCHITECTURE.md: every file of the package, by what it says it is."""

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


@table("files")
def files():
    """A line per file, folder by folder, the lowest floor first."""
    folders = [path for path in (ROOT / "leangpt").iterdir() if (path / "__init__.py").exists()]
    place = {name: number for number, name in enumerate(FLOORS)}
    folders.sort(key=lambda path: (place.get(path.name, len(place)), path.name))
    lines = []
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if path.name != "__init__.py":
                lines.append([f"`{path.relative_to(ROOT)}`", summary(path)])
    return markdown(["file", "what it is"], lines, words=2)
