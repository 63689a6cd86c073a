"""The arrays of a part in a block of memory, for the process that fills it and the one that writes
the part.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dspark.cache.files.layout import StoredArray
from dspark.cache.shared.blocks import ALIGN, Array, Handle, Region, mapped, view


def regions(specs: Iterable[StoredArray]) -> tuple[dict[str, Region], int]:
    """Lay out the arrays ``specs`` one after another; also returns their total size in bytes."""
    out: dict[str, Region] = {}
    end = 0
    for spec in specs:
        out[spec.name] = Region(end, spec.shape, spec.dtype)
        size = int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
        end += -(-size // ALIGN) * ALIGN
    return out, end


def attach(handle: Handle, places: dict[str, Region]) -> dict[str, Array]:
    """Map the arrays of a block of the parent, in a worker process."""
    memory = mapped(handle)
    return {name: view(memory, region) for name, region in places.items()}
