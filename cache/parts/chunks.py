"""How an array is cut into chunks, how each is compressed, and what its bytes may claim."""

from __future__ import annotations

from typing import Any

import numcodecs.blosc
import numpy as np
from numcodecs import Blosc, Zstd

from dspark.cache.errors import DamagedCacheError
from dspark.cache.files.layout import StoredArray
from dspark.cache.files.urls import Where
from dspark.cache.records import Array

# of values per byte of a file at most; bytes that any file may claim
CLAIM, CLAIM_FLOOR = 1024, 64 << 20


# Blosc's own threads may finish blocks in any order; one thread per chunk gives the same bytes
# every time.
numcodecs.blosc.use_threads = False
# Nor the lock for them, which numcodecs makes at the first chunk even so: a reader's has a name,
# and Python warns of a leak where the reader was killed. If this is not asked any more, it warns.
numcodecs.blosc._MUTEX_IS_INIT = True


def compressor(spec: StoredArray) -> Any:
    """zstd behind a byte shuffle for multi-byte values, plain zstd for bytes, None at level 0;
    ``part.write_array`` writes it into the metadata.
    """
    if not spec.level:
        return None
    if spec.shuffle:
        return Blosc(cname="zstd", clevel=spec.level, shuffle=Blosc.SHUFFLE)
    return Zstd(level=spec.level)


def chunk_rows(spec: StoredArray) -> int:
    """Return the rows of each chunk of the array; the last chunk is filled up."""
    return max(1, min(spec.chunk, spec.shape[0]))


def row_bytes(spec: StoredArray) -> int:
    """Return the bytes of a row, uncompressed."""
    return int(np.prod(spec.shape[1:], dtype=np.int64)) * np.dtype(spec.dtype).itemsize


def check_claim(path: Where, claimed: int, size: int) -> None:
    """Raise DamagedCacheError, before anything is allocated, if a file of ``size`` bytes is far too
    small for the ``claimed`` bytes of its array.
    """
    if claimed > max(CLAIM_FLOOR, CLAIM * size):
        raise DamagedCacheError(f"{path}: {size:,} bytes that claim to decompress to {claimed:,}")


def blosc_size(packed: Array) -> int | None:
    """Return the decompressed size that a blosc chunk claims."""
    return int.from_bytes(packed[4:8].tobytes(), "little") if len(packed) >= 16 else None


def zstd_size(packed: Array) -> int | None:
    """Return the decompressed size that a zstd frame claims (RFC 8878, 3.1.1.1); None if it is not
    a frame or does not say.
    """
    head = packed[:18].tobytes()
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    kind, single = head[4] >> 6, head[4] >> 5 & 1
    width = (1 if single else 0, 2, 4, 8)[kind]
    at = 5 + (not single) + (0, 1, 2, 4)[head[4] & 3]
    if not width or len(head) < at + width:
        return None
    return int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0)
