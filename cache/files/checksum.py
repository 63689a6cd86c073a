"""CRC-32C and CRC-32 of bytes in memory: ``fastcrc`` where there is a wheel of it, else what zarr brings and Python's own.

Measured on one core of an EPYC with AVX-512, blocks of 500 kB: crc32c 57 GB/s (google_crc32c 28), crc32 57 GB/s (zlib 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

crc32c: Callable[[Any], int]
crc32: Callable[[Any, int], int]  # of the bytes, going on from an earlier result (0 to begin)

try:
    import fastcrc.crc32

    crc32c, crc32 = fastcrc.crc32.iscsi, fastcrc.crc32.iso_hdlc
except ImportError:
    import zlib

    import google_crc32c

    crc32c, crc32 = google_crc32c.value, zlib.crc32
