"""The rules of the house (docs/ARCHITECTURE.md), each in a few lines over the files' imports."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"model", "attention_policies", "optimizers", "configurator"}
SCRIPTS = {"train", "sample", "bench", "plan", "compare"}
# an import goes to a lower floor, or to the same one, where there are no circles
FLOORS = [
    {"system"},
    {"attention", "kv_cache", "layers", "optim", "text"},
    {"decoding", "weights", "memory", "parallel"},
    {"int4", "runs"},
    {"training"},
]
FILES = [  # tracked, and new ones that git does not ignore
    Path(name)
    for name in subprocess.run(
        ["git", "ls-files", "*.py", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    if (ROOT / name).exists()
]


def floor(folder):
    return next(i for i, folders in enumerate(FLOORS) if folder in folders)


def imports(path):
    """(module, is it inside a function?) for each import of a file; `from a import b` is a.b."""
    tree = ast.parse((ROOT / path).read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", id(node) in inside) for alias in node.names)


def module_file(name):
    """The file of this repository that an imported name lives in, or None."""
    parts = name.split(".")
    for end in (len(parts), len(parts) - 1):
        stem = "/".join(parts[:end])
        for path in (Path(f"{stem}.py"), Path(f"{stem}/__init__.py")):
            if path in FILES:
                return path
    return None


def package_files():
    return [path for path in FILES if path.parts[0] == "leangpt"]


@pytest.mark.slow
def test_the_package_never_imports_a_page():
    bad = {
        str(path)
        for path in package_files()
        for name, _ in imports(path)
        if name.split(".")[0] in PAGES | SCRIPTS | {"experiments", "data", "tests"}
    }
    assert bad == set()


def test_scripts_never_import_each_other():
    scripts = [Path(f"{name}.py") for name in PAGES | SCRIPTS if (ROOT / f"{name}.py").exists()]
    bad = {str(p) for p in scripts for name, _ in imports(p) if name.split(".")[0] in SCRIPTS}
    assert bad == set()


@pytest.mark.slow
def test_arrows_go_down():
    bad = set()
    for path in package_files():
        for name, _ in imports(path):
            parts = name.split(".")
            if parts[0] == "leangpt" and len(path.parts) > 2 and len(parts) > 2:
                if floor(parts[1]) > floor(path.parts[1]):
                    bad.add(f"{path} -> {parts[1]}")
    assert bad == set()


@pytest.mark.slow
def test_no_circles():
    arrows = {path: {module_file(name) for name, _ in imports(path)} - {None} for path in FILES}
    done, walking = set(), []

    def walk(path):
        if path in walking:
            pytest.fail("a circle: " + " -> ".join(map(str, walking[walking.index(path) :])))
        if path not in done:
            walking.append(path)
            for target in arrows.get(path, ()):
                if target != path:
                    walk(target)
            done.add(walking.pop())

    for path in FILES:
        walk(path)


@pytest.mark.slow
def test_no_import_of_ours_inside_a_function():
    """Such an import dodges a circle, unless it brings in Triton, which only some machines have,
    or hands a name of a package to whoever asks for it."""
    bad = {
        f"{path}: {name}"
        for path in FILES
        if path.parts[0] not in ("tests", "experiments") and path.name != "__init__.py"
        for name, inside in imports(path)
        if inside and module_file(name) and "triton" not in name
    }
    assert bad == set()


def test_files_and_folders_stay_small():
    long = {str(p) for p in FILES if len((ROOT / p).read_text().splitlines()) > 450}
    assert long == set()
    counts = {}
    for path in package_files():
        counts[path.parent] = counts.get(path.parent, 0) + 1
    assert max(counts.values()) <= 16


def test_the_root_is_short():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True)
    names = {line.split("/")[0] for line in listed.stdout.decode().split("\n") if line}
    visible = {name for name in names if not name.startswith(".")}
    assert len(visible) <= 22
    modules = {name.removesuffix(".py") for name in visible if name.endswith(".py")}
    assert modules - PAGES - SCRIPTS == set()


def test_every_root_module_defines_something():
    for name in PAGES | SCRIPTS:
        if (ROOT / f"{name}.py").exists():
            tree = ast.parse((ROOT / f"{name}.py").read_text())
            defined = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
            assert len(defined) >= 2, f"{name}.py only hands on"


def test_the_loop_is_on_one_screen():
    trainer = next(n for n in ast.parse((ROOT / "train.py").read_text()).body
                   if isinstance(n, ast.ClassDef) and n.name == "Trainer")  # fmt: skip
    assert trainer.end_lineno - trainer.lineno < 150


@pytest.mark.slow
def test_public_names_say_what_they_are():
    """Classes and functions of the package and of the pages at the root, private ones aside."""
    mute = []
    for path in FILES:
        if path.parts[0] == "leangpt" or len(path.parts) == 1:
            for node in ast.parse((ROOT / path).read_text()).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                    assigned = getattr(node.body[0], "targets", [ast.Name("")])[
                        0
                    ]  # __doc__ = f"..."
                    if not ast.get_docstring(node) and getattr(assigned, "id", "") != "__doc__":
                        mute.append(f"{path}:{node.lineno} {node.name}")
    assert mute == []
