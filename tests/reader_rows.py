"""Rows for reading processes, which import this: they are started afresh and know nothing of a
test's own module.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dspark.cache import errors


class Numbers(Dataset[Any]):
    """``rows[epoch, i]`` is i; some are not to be had."""

    def __getitem__(self, at: tuple[int, int]) -> Any:
        epoch, i = at
        if epoch == 1 and i == 2:
            time.sleep(600)
        if epoch == 2 and i == 2:
            raise errors.DamagedCacheError("part 3 is damaged")
        if epoch == 3 and i == 2:
            os._exit(7)
        return i


class Many(Dataset[Any]):
    """``rows[epoch, i]`` is i, out of more numbers than a pipe holds."""

    def __init__(self) -> None:
        self.numbers = np.arange(100_000)

    def __getitem__(self, at: tuple[int, int]) -> int:
        return int(self.numbers[at[1]])
