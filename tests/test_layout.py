"""The layout of doc/code.md: imports point one way, and nothing imports a script."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("Util", "train_hyperparams", "Model", "Dataset", "Evaluation", "Compression")
"""Each may import itself and those before it; train_hyperparams.py is data alone: settings."""
TOP = ("studies", "benchmarks")
"""These import all of the above, as the scripts do."""
FILES = [
    file.relative_to(ROOT)
    for name in (*LEVELS, *TOP)
    for file in (
        [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").is_file() else (ROOT / name).rglob("*.py")
    )
]
SCRIPTS = {file.stem for file in ROOT.glob("*.py")} - set(LEVELS)


def imported(file):
    """Modules that a file imports anywhere in it, by their dotted names."""
    names = set()
    tree = ast.parse((ROOT / file).read_text())
    # What a module runs as a program is not imported with it.
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "__name__" in ast.dump(n))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def module(file):
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_one_way(file):
    own = file.with_suffix("").parts[0]
    allowed = (*LEVELS, own) if own in TOP else LEVELS[: LEVELS.index(own) + 1]
    for name in imported(file):
        first = name.split(".")[0]
        assert first not in SCRIPTS, f"{file} imports the script {name}"
        assert first in allowed or first not in (*LEVELS, *TOP), f"{file} imports {name}"


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_no_script_imports_a_script(script):
    assert not {name.split(".")[0] for name in imported(f"{script}.py")} & SCRIPTS


def test_no_import_circle():
    known = {module(file): file for file in FILES}
    graph = {}
    for name, file in known.items():
        # A name that is itself a module counts as that module, not as the package that holds it.
        found = imported(file)
        packages = {n.rpartition(".")[0] for n in found & known.keys()}
        graph[name] = {n for n in found if n in known and n != name and n not in packages}
    list(TopologicalSorter(graph).static_order())


def test_util_needs_no_network():
    sys.path.insert(0, str(ROOT))
    for file in (ROOT / "Util").glob("*.py"):
        assert not {n for n in imported(file) if n.split(".")[0] in LEVELS[1:]}
