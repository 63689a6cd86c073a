"""Checkpoints: master weights, moments and the position in the stream, committed by rename; the
newest one is resumed.

checkpoints/step_00001200/ model.safetensors (float32 masters) optimizer.safetensors (moments)
state.json

They hold complete tensors by name, so a run continues with any strategy on any number of ranks.
``state.json`` is sealed, and holds the checksums of the other files and the digest of the store: a
checkpoint that was changed, or belongs to other states, is not resumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.cache import json_text
from dspark.cache.canonical import sealed, unseal
from dspark.cache.errors import DamagedCacheError, MismatchError, TrainError
from dspark.cache.files.atomic import (
    STAGING,
    clear_staging,
    fsync_path,
    remove,
    staged,
    write_errors,
)
from dspark.cache.files.checksum import file_sums
from dspark.cache.typed_json import build

if TYPE_CHECKING:
    from torch import Tensor

    from dspark.train.optim.base import Optimizer, Snapshot

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
BEFORE = "Remove that folder to resume from the one before it."


@dataclass(frozen=True, slots=True)
class Position:
    """Position in the run: optimizer steps done, and the next step of the stream as (epoch, step
    within it).

    ``best``: the highest validation so far by each metric that may select the draft.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class State:
    """The contents of ``state.json``. ``files``: bytes and crc32c of the other files by name;
    ``store``: the digest of the store.
    """

    position: Position
    files: Mapping[str, tuple[int, int]]
    store: str


def save(folder: Path, position: Position, snapshot: Snapshot, keep: int, store: str = "") -> Path:
    """Write ``folder/step_N`` completely or not at all, replacing an existing one; then delete all
    but the newest ``keep``.
    """
    from safetensors.torch import save_file

    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        clear_staging(folder)
    final = folder / name_of(position.step)
    moments = {f"{m}.{n}": t for m, tensors in snapshot.moments.items() for n, t in tensors.items()}
    with staged(final, replace=True) as new:
        new.mkdir()
        save_file(dict(snapshot.masters), new / WEIGHTS)
        save_file(moments, new / MOMENTS, metadata={"updates": str(snapshot.updates)})
        sums = {n: file_sums(new / n)[:2] for n in (WEIGHTS, MOMENTS)}
        (new / STATE).write_text(json.dumps(sealed(asdict(State(position, sums, store)))))
    with write_errors(folder):
        for old in found(folder)[:-keep]:
            _discard(old)
    return final


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def _discard(old: Path) -> None:
    """Delete a checkpoint, which is invalid as soon as the first of its files is gone."""
    aside = old.with_name(STAGING + old.name)
    os.rename(old, aside)
    fsync_path(old.parent)
    remove(aside)


def found(folder: Path) -> list[Path]:
    """Return the checkpoints, oldest first. They are committed by rename, so one that lacks a file
    is damaged.
    """
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def load(path: Path, optimizer: Optimizer, store: str = "") -> Position:
    """Restore ``optimizer`` (and through it the model) from the checkpoint at ``path``.

    Raises TrainError if it is not what was written, MismatchError if it was trained on a store with
    another digest than ``store``.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    from dspark.train.optim.base import Snapshot

    try:
        state = read_state(path)
        masters, flat = load_file(path / WEIGHTS), load_file(path / MOMENTS)
        with safe_open(path / MOMENTS, framework="pt") as file:
            updates = int(file.metadata()["updates"])
    except Exception as error:
        raise TrainError(f"{path}: the checkpoint cannot be resumed: {error}. {BEFORE}") from error
    if state.store != store:
        raise MismatchError(
            f"{path} was trained on a store with digest {state.store[:12]}, but the store now "
            f"has {store[:12]}: its states or masks differ. Use the store that the "
            "training started with, or another --output."
        )
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        kind, name = key.split(".", 1)
        moments.setdefault(kind, {})[name] = tensor
    optimizer.load(Snapshot(masters, moments, updates))
    return state.position


def read_state(path: Path) -> State:
    """Read the state of the checkpoint at ``path`` and compare the checksums of its files. Raises
    DamagedCacheError or OSError.
    """
    where = str(path / STATE)
    data = json_text.read(path / STATE)
    if isinstance(data, dict) and "crc32c" not in data:
        raise DamagedCacheError(
            f"{where} has no checksums, as those of earlier releases: finish that run with the "
            "release that started it"
        )
    body = unseal(data, where)
    state = build(State, {**body, "position": build(Position, body.get("position"), where)}, where)
    if name_of(state.position.step) != path.name:
        raise DamagedCacheError(
            f"{where} is for step {state.position.step}, but the folder is {path.name}"
        )
    for name in (WEIGHTS, MOMENTS):
        expected, sums = tuple(state.files[name]), file_sums(path / name)[:2]
        if sums != expected:
            raise DamagedCacheError(
                f"{path / name}: size and crc32c are {sums}, expected {expected}"
            )
    return state
