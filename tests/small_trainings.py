"""A training of seconds on a small store of random states, for tests of the loop and what it
writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stores
from dspark.train.config import TrainConfig


def small_training(folder: Path, lengths: Sequence[int], **changes: Any) -> TrainConfig:
    """Into ``folder``/draft, from ``folder``/hs.zarr, which is written with samples of ``lengths``
    tokens. Every step is logged.
    """
    stores.write_store(folder / "hs.zarr", list(lengths))
    base: dict[str, Any] = {
        "num_layers": 1,
        "block_size": 3,
        "markov_rank": 4,
        "total_seq_len": 256,
        "rows_per_step": 1,
        "max_anchors": 16,
        "log_every": 1,
        "val_fraction": 0.2,
        "tensorboard": False,
    }
    return TrainConfig(
        cache=str(folder / "hs.zarr"), output=str(folder / "draft"), **{**base, **changes}
    )
