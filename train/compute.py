"""Where a draft runs, in which dtype and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark.cache.errors import UsageError
from dspark.cache.shared.process import choose_device, make_current
from dspark.train.distributed import World
from dspark.train.draft.attention import Backend


@dataclass(frozen=True, slots=True)
class Compute:
    """Where the draft runs, and in which dtype."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend
    compiled: bool


def choose_compute(
    device: str, dtype: str, compiled: bool | None, world: World | None = None
) -> Compute:
    """``auto`` takes cuda with bfloat16 if there is one, else cpu with float32 (bfloat16 is
    emulated and slow on most CPUs). A GPU by number becomes the process's current one.
    """
    chosen = choose_device(device)
    cuda = chosen.type == "cuda"
    if cuda and world is not None and world.size > 1:
        chosen = torch.device("cuda", world.local_rank)
    names = {
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "auto": torch.bfloat16 if cuda else torch.float32,
    }
    if dtype not in names:
        raise UsageError(f"--dtype {dtype}: expected auto, bfloat16 or float32")
    make_current(chosen)
    return Compute(
        chosen, names[dtype], "flex" if cuda else "sdpa", cuda if compiled is None else compiled
    )
