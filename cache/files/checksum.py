"""CRC-32C and CRC-32 of bytes in memory, and the sha256 of a file.

Measured on one core of an EPYC with AVX-512, blocks of 500 kB: crc32c 57 GB/s (google_crc32c 28),
crc32 57 GB/s (zlib 2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastcrc.crc32

# Checksum of bytes, continuing from an earlier result (0 to begin).
crc32c: Callable[..., int] = fastcrc.crc32.iscsi
crc32: Callable[..., int] = fastcrc.crc32.iso_hdlc


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sums(path: Path) -> tuple[int, int, int]:
    """Size in bytes, crc32c and crc32 of a file."""
    size = crc = other = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            crc, other = crc32c(block, crc), crc32(block, other)
    return size, crc, other


def of_bytes(data: Any) -> int:
    """Return the crc32c of an array's bytes."""
    return crc32c(memoryview(data).cast("B")) if len(data) else 0
