"""Checkpoints: master weights, moments and the position in the stream, committed by rename; the
newest one is resumed.

checkpoints/step_00001200/ model.safetensors (float32 masters) optimizer.safetensors (moments)
state.json

They hold whole tensors under their names, so a run goes on with any strategy on any number of
ranks. ``state.json`` is sealed, and has the checksums of the other files and the digest of the
store: what differs from what was written, or belongs to other states, is not resumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.cache import json_text
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
from dspark.cache.manifest import build, sealed, unseal

if TYPE_CHECKING:
    from torch import Tensor

    from dspark.train.optim.base import Optimizer, Snapshot

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
BEFORE = "Remove that folder to resume from the one before it."


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the run: optimizer steps done in all, and the next step of the stream as (epoch,
    step within it).

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
    """What ``state.json`` holds. ``files``: bytes and crc32c of the others by name; ``store``: the
    digest of the store.
    """

    position: Position
    files: Mapping[str, tuple[int, int]]
    store: str


def save(folder: Path, position: Position, snapshot: Snapshot, keep: int, store: str = "") -> Path:
    """Write ``folder/step_N`` whole or not at all, in the place of one that is there; then delete
    all but the newest ``keep``.
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
    """Delete a checkpoint, which is none any more once the first of its files goes."""
    aside = old.with_name(STAGING + old.name)
    os.rename(old, aside)
    fsync_path(old.parent)
    remove(aside)


def found(folder: Path) -> list[Path]:
    """Checkpoints, oldest first. They are committed by rename, so one that lacks a file is
    damaged.
    """
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def load(path: Path, optimizer: Optimizer, store: str = "") -> Position:
    """Restore ``optimizer`` (and through it the model) from the checkpoint at ``path``.

    Raises TrainError where it is not what was written, MismatchError where it was trained on
    another store than that of digest ``store``.
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
            f"{path} was trained on a store of digest {state.store[:12]}, the store now has "
            f"{store[:12]}: other states or masks. "
            "Use the store that the training was begun on, or another --output."
        )
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        kind, name = key.split(".", 1)
        moments.setdefault(kind, {})[name] = tensor
    optimizer.load(Snapshot(masters, moments, updates))
    return state.position


def read_state(path: Path) -> State:
    """The state of the checkpoint at ``path``, the checksums of its files compared. Raises
    DamagedCacheError or OSError.
    """
    where = str(path / STATE)
    data = json_text.read(path / STATE)
    if isinstance(data, dict) and "crc32c" not in data:
        raise DamagedCacheError(
            f"{where} has no checksums, as those of earlier releases: end that run with the "
            "release that began it"
        )
    body = unseal(data, where)
    state = build(State, {**body, "position": build(Position, body.get("position"), where)}, where)
    if name_of(state.position.step) != path.name:
        raise DamagedCacheError(
            f"{where} is of step {state.position.step}, the folder is {path.name}"
        )
    for name in (WEIGHTS, MOMENTS):
        expected, sums = tuple(state.files[name]), file_sums(path / name)[:2]
        if sums != expected:
            raise DamagedCacheError(
                f"{path / name}: bytes and crc32c are {sums}, expected {expected}"
            )
    return state
