"""The sample index: where every sample of a store lies. Pure; both the writer (at finish) and the reader (while incomplete) build it here.

``sample_start`` int64[N+1] and ``sample_last_start`` int64[N+1]: first token / first stored last state of each sample, over the whole store.
``sample_row`` int64[N], ``sample_key`` uint8[N,16]: source row and prompt hash. ``sample_supervised`` int32[N]: supervised tokens.
``part_first_sample`` int64[P+1]: first sample of each part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from dspark.cache.files.layout import StoredArray
from dspark.cache.files.part import Array

# What of a part's arrays the index is made from.
PART_ARRAYS = ("sample_start", "sample_last_start", "sample_row", "sample_key", "loss_mask")


def build_index(parts: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """Index of a store from the ``PART_ARRAYS`` of its parts, in order."""
    starts: list[Array] = [np.zeros(1, np.int64)]
    lasts: list[Array] = [np.zeros(1, np.int64)]
    rows: list[Array] = [np.zeros(0, np.int64)]
    keys: list[Array] = [np.zeros((0, 16), np.uint8)]
    supervised: list[Array] = [np.zeros(0, np.int32)]
    first = [0]
    for part in parts:
        start = part["sample_start"]
        starts.append(start[1:] + starts[-1][-1])
        lasts.append(part["sample_last_start"][1:] + lasts[-1][-1])
        rows.append(part["sample_row"])
        keys.append(part["sample_key"])
        supervised.append(np.add.reduceat(part["loss_mask"].astype(np.int32), start[:-1]).astype(np.int32))
        first.append(first[-1] + part["sample_row"].shape[0])
    return {
        "sample_start": np.concatenate(starts),
        "sample_last_start": np.concatenate(lasts),
        "sample_row": np.concatenate(rows),
        "sample_key": np.concatenate(keys),
        "sample_supervised": np.concatenate(supervised),
        "part_first_sample": np.array(first, dtype=np.int64),
    }


def index_specs(index: Mapping[str, Array]) -> list[StoredArray]:
    """How the index is stored: chunks of 65,536 samples."""
    return [
        StoredArray(name, data.shape, str(data.dtype), 65536, 0 if data.itemsize == 1 else data.itemsize)
        for name, data in index.items()
    ]
