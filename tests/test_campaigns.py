"""The campaigns' short form; ``make campaign`` runs them whole."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "campaign"


@pytest.mark.parametrize(
    ("name", "count"),
    [("recode", 2), ("stores", 10), ("transient", 30)],
)
def test_short_form(name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    folder = tmp_path / "work"
    folder.mkdir()
    found = runpy.run_path(str(HERE / "run.py"))["run"](name, count, 1, folder)
    assert found["findings"] == []
