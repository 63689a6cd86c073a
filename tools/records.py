"""Read the JSON files beside a draft and the reports on it carefully: they may have been truncated,
edited or mixed up. What a command needs from a file is a shape (``dspark.tools.shapes``), checked
as soon as the file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark.cache.errors import DraftError
from dspark.tools.shapes import Each, Maybe, Optional, require
from dspark.train.run.folder import STORE, TRAINING, read_record
from dspark.train.run.history import HISTORY
from dspark.train.run.metrics_file import REMEDY, read_metrics

CALIBRATION = "calibration.json"
TEMPERATURES = "temperatures.json"  # the same temperatures as SGLang reads them

_TRAINING = {"block_size": Optional(int)}
_STORE = {
    "target": Optional(str),
    "layers": Optional([int]),
    "source": Optional(str),
    "aux_bits": Optional(int),
    "last_bits": Optional(int),
    "stores": Optional(
        [{"source": Optional(str), "aux_bits": Optional(int), "last_bits": Optional(int)}]
    ),
}
_HISTORY = {
    "start": Optional(
        {
            "folder": str,
            "weights_sha256": str,
            "taken": int,
            "left": {},
            "begun": {},
            "changed": {},
        }
    ),
    "sessions": [{"from_step": int, "to_step": int, "ended": str}],
}
_STEP = {"step": int, "mean_accepted_length": Optional(float), "accept_rate": Optional([float])}
_SURVIVAL = {
    "ece": [float],
    "brier": [float],
    "auroc": [Maybe(float)],
    "confidence": [float],
    "accepted": [float],
    "diagram": [[{"confidence": float, "accepted": float}]],
}
_CALIBRATION = {
    "temperature": [float],
    "before": {"survival": _SURVIVAL},
    "after": {"survival": _SURVIVAL},
    "recommended_threshold": Optional(float),
    "sweep": [{"threshold": float, "verified": float, "tokens": float, "accepted_share": float}],
}
_LINE = {
    "prompts": int,
    "drafts": int,
    "mean_accepted_length": Maybe(float),
    "mean_accepted_length_se": Maybe(float),
    "accept_rate": Maybe([float]),
    "lossless": Maybe(bool),
    "tokens_per_second": Maybe(float),
    "tokens_per_second_target": Maybe(float),
    "speedup": Maybe(float),
    "theoretical_gain": Maybe(float),
}
_REPORT = _LINE | {
    "engine": str,
    "dtype": str,
    "temperature": float,
    "max_tokens": int,
    "block_size": int,
    "compared": int,
    "per_source": Each(_LINE),
}


def training(draft: Path, *, val_fraction: bool = False) -> dict[str, Any]:
    """Read training.json; {} if there is none. ``val_fraction``: it must say how the run split its
    store.
    """
    found = _of_the_run(
        draft / TRAINING, _TRAINING | ({"val_fraction": float} if val_fraction else {})
    )
    if val_fraction and found and not 0 <= found["val_fraction"] <= 1:
        raise DraftError(
            f"{draft / TRAINING}: val_fraction is {found['val_fraction']}, not a share from 0 to "
            f"1; {_RUN_REMEDY}"
        )
    return found


def store(draft: Path) -> dict[str, Any]:
    """Read store.json; {} if there is none."""
    return _of_the_run(draft / STORE, _STORE)


def history(draft: Path) -> dict[str, Any]:
    """Read history.json; {} if there is none."""
    return _of_the_run(draft / HISTORY, _HISTORY)


_RUN_REMEDY = "expected the object that dspark-train wrote: restore a complete copy of the file"


def _of_the_run(path: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = read_record(path)
    require(found, shape, path, _RUN_REMEDY)
    return found


def metrics(draft: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl; none if there is no such file. Held-out rows that have a
    length also have accept rates.
    """
    rows = []
    for where, row in read_metrics(draft):
        rates = {"accept_rate": [float]} if _judged(row) else {}
        require(row, _STEP | rates, where, REMEDY)
        rows.append(row)
    return rows


def _judged(row: Mapping[str, Any]) -> bool:
    return bool(row.get("validation") and row.get("mean_accepted_length"))


def calibration(draft: Path) -> dict[str, Any]:
    """Read calibration.json; {} if there is none."""
    path = draft / CALIBRATION
    if not path.exists():
        return {}
    remedy = (
        "expected a report of dspark-tools calibrate --write: run that again, or remove the file"
    )
    found = read_record(path, remedy)
    require(found, _CALIBRATION, path, remedy)
    best = found.get("recommended_threshold")  # absent from reports of before 0.2
    if best is not None and best not in [point["threshold"] for point in found["sweep"]]:
        raise DraftError(f"{path}: recommended_threshold {best} is not in the sweep; {remedy}")
    slots = len(found["temperature"])
    for name in ("before", "after"):
        for key in _SURVIVAL:
            if len(found[name]["survival"][key]) != slots:
                raise DraftError(
                    f"{path}: {name}.survival.{key} has {len(found[name]['survival'][key])} "
                    f"positions, but temperature has {slots}; {remedy}"
                )
    return found


def report(path: Path) -> dict[str, Any]:
    """Read a report of ``dspark-tools eval``."""
    remedy = "expected a file that dspark-tools eval --output wrote"
    found = read_record(path, remedy)
    require(found, _REPORT, path, remedy)
    return found


def manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of an exported draft."""
    remedy = "expected what dspark-tools export wrote: export again"
    found = read_record(path, remedy)
    require(found, {"files": Each({"sha256": str})}, path, remedy)
    return found
