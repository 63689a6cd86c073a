"""Bytes that states will take on disk, measured: a sample of them is coded and compressed as a part of a store would be.

Without zstd (``--pack none``) the formula is exact and this agrees with it. With zstd, it
(``layout.disk_bytes_per_token``) knows the entropy of Gaussian cells and nothing of the text. Where tokens repeat, early layers repeat
with them, and zstd finds it: SmolLM2 stores come out 9 to 13 % below the formula at 4 to 2 bits. So a plan made without states uses the formula, which
is a little too large, and whatever has seen states uses this: from 8,000 tokens within 5 %, from 15,000 within 2 % (docs/log/2026-11-22-compact-cache.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from dspark.cache.codec.rotated import Codec, to_numpy
from dspark.cache.files.layout import state_array, token_bytes
from dspark.cache.files.shard import chunk_rows, compressor

if TYPE_CHECKING:
    import torch

CHUNK_OVERHEAD = 20  # bytes: crc32c of the chunk, its offset and length in the shard's index


@dataclass(frozen=True, slots=True)
class RowBytes:
    """Bytes of a row on disk: ``aux`` a token, ``last`` a stored last state, ``token`` a token without its states."""

    aux: float
    last: float
    token: float

    @classmethod
    def of(cls, aux_codec: Codec, last_codec: Codec, aux: torch.Tensor, last: torch.Tensor) -> Self:
        """Measured on ``aux`` [T, L, H] and ``last`` [M, H], rows in the order of a store."""
        return cls(_row_bytes(aux_codec, aux), _row_bytes(last_codec, last), token_bytes(aux_codec))

    def store(self, tokens: int, last_rows: int) -> int:
        """Bytes of a store's parts: everything but the target's files and the index."""
        return round(tokens * (self.token + self.aux) + last_rows * self.last)


def _row_bytes(codec: Codec, states: torch.Tensor) -> float:
    if not states.shape[0]:
        return 0.0
    total = 0.0
    specs = codec.arrays(states.shape[-1])
    for name, data in to_numpy(codec.encode(states)).items():
        spec = state_array(name, data.shape, specs[name])
        packer, rows = compressor(spec), chunk_rows(spec)
        whole = data.shape[0] // rows * rows  # the last, shorter chunk would be filled up with zeros
        size = 0
        for start in range(0, whole, rows):
            piece = np.ascontiguousarray(data[start : start + rows])
            packed = packer.encode(piece if spec.shuffle else piece.view(np.uint8)) if packer else piece.data
            size += memoryview(packed).nbytes + CHUNK_OVERHEAD
        total += size / whole
    return total
