"""The arrays of a part in a block of memory, for the process that fills it and the one that writes
the part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from dspark.cache.files.layout import StoredArray
from dspark.cache.shared.blocks import ALIGN, Array, Handle, Region, SharedBlock, mapped, view


def regions(
    arrays: Iterable[tuple[str, StoredArray | Array]],
) -> tuple[dict[str, Region], int]:
    """Lay out named arrays one after another; also returns their total size in bytes."""
    out: dict[str, Region] = {}
    end = 0
    for name, array in arrays:
        dtype = np.dtype(array.dtype)
        out[name] = Region(end, array.shape, dtype.str)
        size = int(np.prod(array.shape, dtype=np.int64)) * dtype.itemsize
        end += -(-size // ALIGN) * ALIGN
    return out, end


class SharedArrays:
    """Copies of ``arrays`` that a worker process maps (``attach``). Pickled, those of a part would
    hold Python's lock for as long as it takes to copy them twice.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.places, size = regions(arrays.items())
        self._block = SharedBlock(True, "dspark-job")
        self._block.reserve(max(size, 1))
        self._block.populate()
        for name, array in arrays.items():
            self._block.array(self.places[name])[...] = array

    def handle(self) -> Handle:
        return self._block.handle()

    def close(self) -> None:
        """Free the memory; a worker that has mapped it keeps its own."""
        self._block.close()


def attach(handle: Handle, places: dict[str, Region]) -> dict[str, Array]:
    """Map the arrays of a block of the parent, in a worker process."""
    memory = mapped(handle)
    return {name: view(memory, region) for name, region in places.items()}
