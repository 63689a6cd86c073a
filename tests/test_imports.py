"""The layout: who may import whom, how large a folder may be, and that pyproject.toml lists every
folder.
"""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cache", "dump", "train", "tools")
ALLOWED = {
    "cache": {"cache"},
    "dump": {"cache", "dump"},
    "train": {"cache", "train"},
    "tools": {"cache", "dump", "train", "tools"},
}
LARGEST_FOLDER = 16  # modules


def modules(package: str) -> list[Path]:
    """Every module of ``package``, at any depth."""
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names that ``path`` imports at any level, functions and TYPE_CHECKING blocks
    included.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def folder_of(name: str) -> str | None:
    """``dspark.cache.codec.base.Codec`` -> ``cache/codec``: the folder that holds the module; None
    for names of others.
    """
    if not name.startswith("dspark."):
        return None
    parts = name.split(".")[1:]
    for n in range(len(parts), 0, -1):
        at = ROOT.joinpath(*parts[:n])
        if at.with_suffix(".py").is_file():
            return "/".join(parts[: n - 1])
        if at.is_dir():
            return "/".join(parts[:n])
    return None


@pytest.mark.parametrize("package", PACKAGES)
def test_who_imports_whom(package: str) -> None:
    files = modules(package)
    assert len(files) > 25
    for path in files:
        ours = {n.split(".")[1] for n in imported(path) if n.startswith("dspark.")} - {
            "__version__"
        }
        assert ours <= ALLOWED[package], (
            f"{path.relative_to(ROOT)} imports {ours - ALLOWED[package]}"
        )


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_folders_import_each_other(package: str) -> None:
    """The modules that lie directly in a package bind its folders together, so they are not
    counted.
    """
    edges: dict[tuple[str, str], set[str]] = {}
    for path in modules(package):
        here = str(path.parent.relative_to(ROOT))
        for name in imported(path):
            there = folder_of(name)
            if there and there != here and there.startswith(package + "/") and here != package:
                edges.setdefault((here, there), set()).add(f"{path.relative_to(ROOT)}: {name}")
    both = {pair: why for pair, why in edges.items() if pair[::-1] in edges and pair < pair[::-1]}
    assert not both, {f"{a} <-> {b}": (edges[a, b], edges[b, a]) for a, b in both}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_is_larger_than_a_person_keeps_in_mind(package: str) -> None:
    for folder in {path.parent for path in modules(package)}:
        names = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(names) <= LARGEST_FOLDER, f"{folder.relative_to(ROOT)} has {len(names)} modules"


def test_every_folder_is_packaged() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for package in PACKAGES for path in modules(package)}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    names = {"dspark." + str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders}
    assert sorted(listed) == sorted({"dspark", *names})


def test_nothing_depends_on_this_workplace() -> None:
    files = [p for package in (*PACKAGES, "tests", "bench", "examples") for p in modules(package)]
    assert len(files) > 200
    for path in [*files, ROOT / "Makefile"]:
        assert "../shared" not in path.read_text().replace('"../shared" not in', ""), path


@cache
def defined(path: Path) -> set[str]:
    """Names at the top level of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        for part in ast.walk(node) if isinstance(node, ast.If | ast.Try | ast.With) else [node]:
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                names.add(part.name)
            elif isinstance(part, ast.Import | ast.ImportFrom):
                names |= {(a.asname or a.name).partition(".")[0] for a in part.names}
            elif isinstance(part, ast.Assign | ast.AnnAssign):
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names


def module_of(name: str) -> Path | None:
    """The file of a module of a bench or of the project; None for others and for folders."""
    parts = name.split(".")
    base = ROOT.joinpath(*parts[1:]) if parts[0] == "dspark" else ROOT.joinpath("bench", *parts)
    return base.with_suffix(".py") if base.with_suffix(".py").is_file() else None


def test_private_names_stay_in_their_module() -> None:
    """What another module needs has a public name."""
    files = [path for package in (*PACKAGES, "bench") for path in modules(package)]
    crossing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in sorted(imported(path))
        if name.startswith("dspark.") and name.rpartition(".")[2].startswith("_")
    ]
    assert [line for line in crossing if not line.endswith(".__version__")] == []


def imported_first(path: Path) -> set[Path]:
    """The project's modules that ``path`` imports as it is itself imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dspark."):
            inside = {module_of(f"{node.module}.{alias.name}") for alias in node.names}
            found |= inside | {module_of(node.module)}
    return {file for file in found if file is not None}


def test_no_module_imports_itself_in_a_round() -> None:
    graph = {path: imported_first(path) for package in PACKAGES for path in modules(package)}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the round


def test_benches_import_what_is_there() -> None:
    """Most benches run on a GPU only, so nothing else tells when a name has moved."""
    lost = []
    for path in sorted((ROOT / "bench").glob("*.py")):
        tree = ast.parse(path.read_text())
        # an import in a handler is for an older tree
        older = {n for h in ast.walk(tree) if isinstance(h, ast.ExceptHandler) for n in ast.walk(h)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node in older or not node.module:
                continue
            if file := module_of(node.module):
                gone = {alias.name for alias in node.names} - defined(file)
                lost += [f"{path.name}: {node.module}.{name}" for name in sorted(gone)]
    assert not lost
