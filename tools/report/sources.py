"""Read what a path holds, for drawing: a store, a run (draft folder), or an evaluation. Only
records and a few samples are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark.cache.errors import DraftError, UsageError
from dspark.cache.files.place import Place, place_of
from dspark.cache.files.urls import Url, Where
from dspark.tools import records
from dspark.train.run.folder import METRICS, TRAINING
from dspark.train.run.metrics_file import read_metrics

STORE_MARK, PARTS = "zarr.json", "parts"
SAMPLES_READ = 24  # of a store, for rms, extremes and outliers
GROUPS = (
    "aux",
    "last",
    "exact",
)  # prefixes of the arrays that hold states; the rest are tokens and their places


@dataclass(frozen=True, slots=True)
class StoreView:
    """A store: ``info``; ``stats`` ({} if nothing is committed); bytes by group of arrays, stored
    and raw.
    """

    name: str
    path: Where
    info: dict[str, Any]
    stats: dict[str, Any]
    stored: dict[str, int]
    raw: dict[str, int]


@dataclass(frozen=True, slots=True)
class RunView:
    """A training run or a finished draft: its metrics, settings and calibration, {} or [] if there
    are none.
    """

    name: str
    path: Path
    metrics: list[dict[str, Any]]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    history: dict[str, Any] = field(default_factory=dict)

    def rows(self, *, held_out: bool) -> list[dict[str, Any]]:
        return [r for r in self.metrics if bool(r.get("validation")) == held_out]

    def series(self, key: str, *, held_out: bool) -> list[tuple[float, float]]:
        """Return (step, value) wherever ``key`` is a number."""
        rows = self.rows(held_out=held_out)
        return [(r["step"], r[key]) for r in rows if isinstance(r.get(key), int | float)]


@dataclass(frozen=True, slots=True)
class EvalView:
    """A report of ``dspark-tools eval --output``."""

    name: str
    path: Path
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sources:
    """Everything that goes on one page."""

    stores: list[StoreView] = field(default_factory=list)
    runs: list[RunView] = field(default_factory=list)
    evals: list[EvalView] = field(default_factory=list)


def kind_of(path: Where) -> str | None:
    """``store`` (as what is at a URL must be), ``run`` or ``eval``; None for anything else."""
    if isinstance(path, Url):
        return "store"
    if path.is_dir():
        if (path / STORE_MARK).is_file() and (path / PARTS).is_dir():
            return "store"
        return "run" if (path / METRICS).is_file() or (path / TRAINING).is_file() else None
    return "eval" if path.is_file() and path.suffix == ".json" else None


def read(paths: Sequence[Where]) -> Sources:
    """Read ``paths``; a folder that is none of the three stands for its contents. Raises UsageError
    if there is nothing.
    """
    out = Sources()
    taken = [(path, kind) for given in paths for path, kind in _expanded(given)]
    names = _names([path for path, _ in taken])
    for path, kind in taken:
        name = names[path]
        if kind == "store" or isinstance(path, Url):
            out.stores.append(_store(path, name))
        elif kind == "run":
            out.runs.append(_run(path, name))
        else:
            out.evals.append(EvalView(name, path, records.report(path)))
    return out


def _expanded(path: Where) -> Sequence[tuple[Where, str]]:
    if isinstance(path, Url):
        return [(path, "store")]
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    kind = kind_of(path)
    if kind:
        return [(path, kind)]
    inside = sorted(path.iterdir()) if path.is_dir() else []
    found = [(p, k) for p in inside if (k := kind_of(p)) and (k != "eval" or _is_report(p))]
    if not found:
        raise UsageError(
            f"{path}: not a store, a draft folder or a report of `dspark-tools eval --output`, "
            "nor a folder with any of these"
        )
    return found


def _is_report(path: Path) -> bool:
    """Tell whether a JSON file that was not named explicitly is an evaluation rather than something
    else.
    """
    try:
        records.report(path)
    except DraftError:
        return False
    return True


def _names(paths: Sequence[Where]) -> dict[Where, str]:
    """Return the last name of each path, with as many folders before it as make it distinct."""
    out = {}
    split = {path: str(path.resolve()).split("/") for path in paths}
    for path, parts in split.items():
        depth = 1
        while depth < len(parts) and any(
            other != path and found[-depth:] == parts[-depth:] for other, found in split.items()
        ):
            depth += 1
        out[path] = "/".join(parts[-depth:])
    return out


def _store(path: Where, name: str) -> StoreView:
    from dspark.cache import reader
    from dspark.tools.stores.info import info
    from dspark.tools.stores.stats import stats

    facts = info(path)
    numbers = {}
    if facts["samples"]:
        numbers = stats(reader.open(path, allow_incomplete=True), SAMPLES_READ)
    hidden, tokens = facts["hidden_size"], facts["tokens"]
    state = 2 * hidden * tokens
    raw = {
        "aux": state * len(facts["layers"]),
        "last": state,
        "tokens": facts["raw_bytes_per_token"] * tokens - state * (len(facts["layers"]) + 1),
    }
    return StoreView(name, path, facts, numbers, _bytes_by_group(place_of(path)), raw)


def _bytes_by_group(store: Place) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, size in store.sizes(PARTS).items():
        inside = name.split("/")
        array = inside[1] if len(inside) > 2 else ""
        group = next((g for g in GROUPS if array.startswith(f"{g}_")), "tokens")
        found[group] += size
    return dict(found)


def _run(path: Path, name: str) -> RunView:
    settings = records.training(path)
    return RunView(
        name, path, list(metrics(path)), settings, records.calibration(path), records.history(path)
    )


def metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the metrics.jsonl of a training that may be running."""
    for _, row in read_metrics(folder, growing=True):
        yield row
