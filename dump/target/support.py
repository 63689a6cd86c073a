"""What is known about families, engines and servers, as data (``support.json``): one table for
dump, check, card and docs.

A cell is *run* (done here), *read* (follows from a release's source) or *not* (does not work), for
a range of versions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

USES = ("dump", "serve")
STATES = ("run", "read", "not")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """``use``: dump or serve. ``since``, ``until``: versions, both inclusive; None: open.
    ``source``: where this is known from.
    """

    use: str
    engine: str
    state: str
    source: str
    since: str | None = None
    until: str | None = None
    note: str = ""

    def covers(self, version: str | None) -> bool:
        """Tell whether the cell covers ``version``; the newest release if None is installed."""
        if version is None:
            return self.until is None
        at = _numbers(version)
        if self.since is not None and at < _numbers(self.since):
            return False
        # "0.28" covers every 0.28.x
        return self.until is None or at[: len(_numbers(self.until))] <= _numbers(self.until)

    @property
    def versions(self) -> str:
        if self.since is None and self.until is None:
            return ""
        return f"{self.since or ''} to {self.until}" if self.until else f"from {self.since}"


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    model_types: tuple[str, ...]
    cells: tuple[Cell, ...]

    def cell(self, use: str, engine: str, version: str | None = None) -> Cell | None:
        """Return what is known about ``engine`` in ``version``; None = nothing."""
        fit = (c for c in self.cells if (c.use, c.engine) == (use, engine) and c.covers(version))
        return next(fit, None)

    def working(self, use: str) -> list[Cell]:
        """Return the cells of ``use`` that are not *not*."""
        return [c for c in self.cells if c.use == use and c.state != "not"]


@cache
def families() -> tuple[Family, ...]:
    """Return every family of the table, in order."""
    raw = json.loads((Path(__file__).parent / "support.json").read_text())
    return tuple(
        Family(f["name"], tuple(f["model_types"]), tuple(Cell(**c) for c in f["cells"]))
        for f in raw["families"]
    )


@cache
def sources() -> dict[str, str]:
    """Map the short name of a source to its description."""
    out: dict[str, str] = json.loads((Path(__file__).parent / "support.json").read_text())[
        "sources"
    ]
    return out


def family_of(model_types: Iterable[str | None]) -> Family | None:
    """Return the family of a target by the ``model_type`` of its config (a wrapper's first, then
    its text model's); None = not in the table.
    """
    for model_type in model_types:
        for family in families():
            if model_type in family.model_types:
                return family
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.split("+", maxsplit=1)[0])[:3]))
