"""Checkpoints: master weights, moments and the position in the stream, committed by rename; the newest whole one is resumed.

checkpoints/step_00001200/  model.safetensors (float32 masters)  optimizer.pt  state.json
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dspark.cache.disk import STAGING, clear_staging, commit_folder, write_errors
from dspark.cache.errors import TrainError
from dspark.train.optim import MasterAdamW


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the run: optimizer steps done in all, and the next step of the stream as (epoch, step within it)."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(folder: Path, position: Position, optimizer: MasterAdamW, keep: int) -> Path:
    """Write ``folder/step_N`` atomically and delete all but the newest ``keep``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    clear_staging(folder)
    final = folder / f"step_{position.step:08d}"
    staged = folder / (STAGING + final.name)
    with write_errors(final):
        staged.mkdir()
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in optimizer.masters.items()},
            staged / "model.safetensors",
        )
        torch.save(optimizer.state_dict(), staged / "optimizer.pt")
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


def load(path: Path, optimizer: MasterAdamW) -> Position:
    """Restore ``optimizer`` (and through it the model) from the checkpoint at ``path``."""
    from safetensors.torch import load_file

    try:
        position = Position(**json.loads((path / "state.json").read_text()))
        masters = load_file(path / "model.safetensors")
        state = torch.load(path / "optimizer.pt", weights_only=True)
    except Exception as error:
        raise TrainError(
            f"{path}: the checkpoint cannot be read: {error}. Remove that folder to resume from the one before it."
        ) from error
    optimizer.load(masters, state)
    return position
