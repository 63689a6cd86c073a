"""The import rule of docs/architecture.md: cache imports none of the others, dump and train only cache."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "cache": {"cache"},
    "dump": {"cache", "dump"},
    "train": {"cache", "train"},
    "tools": {"cache", "dump", "train", "tools"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_who_imports_whom(package: str) -> None:
    files = sorted((ROOT / package).glob("*.py"))
    assert len(files) > 5
    for path in files:
        ours = {n.split(".")[1] for n in imported(path) if n.startswith("dspark.")}
        assert ours <= ALLOWED[package], f"{path.name} imports {ours - ALLOWED[package]}"


def test_nothing_depends_on_this_workplace() -> None:
    for path in [*ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py"), ROOT / "Makefile"]:
        if ".venv" not in path.parts:
            assert "../shared" not in path.read_text().replace('"../shared" not in', ""), path
