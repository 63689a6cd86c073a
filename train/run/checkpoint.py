"""Checkpoints: master weights, moments and the position in the stream, committed by rename; the newest whole one is resumed.

checkpoints/step_00001200/  model.safetensors (float32 masters)  optimizer.safetensors (moments)  state.json

They hold whole tensors under their names, so a run goes on with any strategy on any number of ranks.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from dspark.cache.errors import TrainError
from dspark.cache.files.atomic import STAGING, clear_staging, commit_folder, write_errors
from dspark.train.optim.base import Optimizer, Snapshot


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the run: optimizer steps done in all, and the next step of the stream as (epoch, step within it)."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(folder: Path, position: Position, snapshot: Snapshot, keep: int) -> Path:
    """Write ``folder/step_N`` atomically and delete all but the newest ``keep``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    clear_staging(folder)
    final = folder / f"step_{position.step:08d}"
    staged = folder / (STAGING + final.name)
    moments = {f"{m}.{n}": t for m, tensors in snapshot.moments.items() for n, t in tensors.items()}
    with write_errors(final):
        staged.mkdir()
        save_file(dict(snapshot.masters), staged / "model.safetensors")
        save_file(moments, staged / "optimizer.safetensors", metadata={"updates": str(snapshot.updates)})
        (staged / "state.json").write_text(json.dumps(asdict(position)))
        if final.exists():
            shutil.rmtree(final)
    commit_folder(staged, final)
    for old in found(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def found(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if (p / "state.json").is_file())


def load(path: Path, optimizer: Optimizer) -> Position:
    """Restore ``optimizer`` (and through it the model) from the checkpoint at ``path``."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    try:
        position = Position(**json.loads((path / "state.json").read_text()))
        masters, flat = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
        with safe_open(path / "optimizer.safetensors", framework="pt") as file:
            updates = int(file.metadata()["updates"])
    except Exception as error:
        raise TrainError(
            f"{path}: the checkpoint cannot be read: {error}. Remove that folder to resume from the one before it."
        ) from error
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        kind, name = key.split(".", 1)
        moments.setdefault(kind, {})[name] = tensor
    optimizer.load(Snapshot(masters, moments, updates))
    return position
