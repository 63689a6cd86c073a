"""How much host memory the rows take that are read ahead: known before the first is read.

Legend: S tokens of a row, M stored last states, A anchors, B slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dspark.cache.joined import Stores
from dspark.cache.reader import Cache
from dspark.cache.records import Array
from dspark.cache.shared.blocks import with_slack

AHEAD = 4  # rows that each reader has ready
# Bytes of a batch's arrays (batch.py): int64, int64, int64, int32 and bool per token; int64 and
# bool per anchor; the same and three of int64 at most per slot.
PER_TOKEN, PER_ANCHOR, PER_SLOT = 29, 9, 33


@dataclass(frozen=True, slots=True)
class Need:
    """``row``: bytes of the largest row that is expected; ``held``: rows that the loop has at a
    time.
    """

    row: int = 0
    held: int = 2

    def count(self, workers: int) -> int:
        """Return how many rows are in memory at a time."""
        return AHEAD * workers + self.held

    def host(self, workers: int) -> int:
        """Return the bytes of host memory that they take; page-locked, if they go to a GPU."""
        return self.count(workers) * with_slack(self.row)


def largest_row(
    cache: Stores, taken: Array, starts: Array, *, block_size: int, anchors: int, pad_to: int
) -> int:
    """Return the bytes of the largest row, row i of samples ``taken[starts[i]:starts[i + 1]]``: a
    little less than it takes, since the mask's tables and tokens stored exactly are not counted.
    ``anchors``: A at most, 0 for all; ``pad_to``: S of every row, with A anchors; 0 for rows as
    long as their samples.
    """
    if starts.shape[0] < 2:
        return 0
    stored = np.concatenate([np.diff(s.index["sample_last_start"]) for s in cache.stores])
    tokens = np.add.reduceat(cache.lengths[taken], starts[:-1])
    last = np.add.reduceat(stored[taken], starts[:-1])
    drawn = np.minimum(last, anchors) if anchors else last
    if pad_to:
        tokens, drawn = np.full_like(tokens, pad_to), np.full_like(last, anchors)
    store = np.searchsorted(cache.starts, taken[starts[:-1]], side="right") - 1
    codes = np.array([_bytes_of(s) for s in cache.stores], np.int64)[store]
    sizes = tokens * (PER_TOKEN + codes[:, 0]) + last * codes[:, 1]
    return int((sizes + drawn * (PER_ANCHOR + block_size * PER_SLOT)).max())


def _bytes_of(store: Cache) -> tuple[int, int]:
    """Return the bytes of codes per token and per stored last state."""
    specs = store.layout.specs.values()
    token, last = (
        sum(spec.row_bytes for spec in specs if spec.axis == axis) for axis in ("token", "last")
    )
    return token, last
