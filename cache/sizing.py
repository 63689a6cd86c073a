"""Measure the bytes that states will take on disk: a sample of them is coded and compressed like a
part of a store.

Without zstd (``--pack none``) the formula is exact and this agrees with it. With zstd, the formula
(``layout.disk_bytes_per_token``) knows the entropy of Gaussian cells, and of the text only what its
ids repeat (``repeats.py``). So a plan made without states uses the formula, and whatever has
states uses this: from 8,000 tokens within 5 %, from 15,000 within 2 %
(docs/log/2026-11-22-compact-cache.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from dspark.cache.codec.base import ArraySpec, Codec, Tokens, to_numpy
from dspark.cache.files.layout import state_array, token_bytes
from dspark.cache.parts.chunks import chunk_rows
from dspark.cache.parts.shard_writer import coded_chunks

if TYPE_CHECKING:
    import torch

INDEX_ENTRY = 16  # bytes: a chunk's offset and length in the shard's index


@dataclass(frozen=True, slots=True)
class RowBytes:
    """Bytes of a row on disk: ``aux`` per token, ``last`` per stored last state, ``token`` per
    token without its states.
    """

    aux: float
    last: float
    token: float

    @classmethod
    def of(
        cls, codec: Codec, aux: torch.Tensor, last: torch.Tensor, tokens: Tokens | None = None
    ) -> Self:
        """Measure ``aux`` [T, L, H] and ``last`` [M, H], rows in the order of a store."""
        specs = codec.arrays(*aux.shape[1:])
        size = {"token": 0.0, "last": 0.0, "exact": 0.0}
        for name, data in to_numpy(codec.encode(aux, last, tokens)).items():
            if name in specs:
                size[specs[name].axis] += packed_bytes(name, data, specs[name])
        rows = {"token": aux.shape[0], "last": last.shape[0], "exact": aux.shape[0]}
        per = {axis: total / max(rows[axis], 1) for axis, total in size.items()}
        return cls(per["token"] + per["exact"], per["last"], token_bytes(codec))

    def store(self, tokens: int, last_rows: int) -> int:
        """Return the bytes of a store's tokens and states: everything but the target's files and
        the metadata of store, parts and samples.
        """
        return round(tokens * (self.token + self.aux) + last_rows * self.last)


def packed_bytes(name: str, data: Any, spec: ArraySpec) -> float:
    """Return the bytes of ``data`` on disk as if it were the middle of a long array."""
    if not data.shape[0]:
        return 0.0
    if spec.axis == "exact":  # a part stores equal rows once
        # Not np.unique, which compares value by value: a hundred times as long for wide rows.
        data = data[list({row.tobytes(): i for i, row in enumerate(data)}.values())]
    stored = state_array(name, data.shape, spec)
    rows = chunk_rows(stored)
    whole = data.shape[0] // rows * rows  # the last, shorter chunk would be filled up with zeros
    chunks = (chunk for some in coded_chunks(stored, data[:whole]) for chunk in some)
    size = sum(len(packed) + len(crc) + INDEX_ENTRY for packed, crc in chunks)
    rate: float = size / whole * data.shape[0]
    return rate
