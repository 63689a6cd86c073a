"""Rows for reading processes, which import this: they are started afresh and know nothing of a
test's own module.
"""

from __future__ import annotations

import os
import time

import numpy as np
import torch

from dspark.cache import errors
from dspark.train.data.row import Field, PackedRow
from dspark.train.data.slots import Room


def row(value: int, room: Room, count: int = 16) -> PackedRow:
    """A row that holds ``value``, ``count`` times."""
    fields = (Field("value", torch.int64, (count,), 0),)
    data = room(8 * count)
    fields[0].of(data).fill_(value)
    return PackedRow(data, fields, tokens=value, slots=0)


class Numbers:
    """Row (epoch, i) holds i; some are not to be had, those of epoch 4 grow."""

    def read(self, at: tuple[int, int], room: Room) -> PackedRow:
        epoch, i = at
        if epoch == 1 and i == 2:
            time.sleep(600)
        if epoch == 2 and i == 2:
            raise errors.DamagedCacheError("part 3 is damaged")
        if epoch == 3 and i == 2:
            os._exit(7)
        if epoch == 5 and i == 2:
            raise KeyError("of a bug")
        return row(i, room, 16 if epoch != 4 else 64 + i)


class Many:
    """Row (epoch, i) holds i, out of more numbers than a pipe holds."""

    def __init__(self) -> None:
        self.numbers = np.arange(100_000)

    def read(self, at: tuple[int, int], room: Room) -> PackedRow:
        return row(int(self.numbers[at[1]]), room)
