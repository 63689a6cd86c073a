"""The sample index: where every sample of a store is. Derived from the parts, and rebuilt from
them; both the writer (at finish) and the reader (of an incomplete store) build it here.

``sample_start`` int64[N+1] and ``sample_last_start`` int64[N+1]: first token / first stored last
state of each sample, over the whole store.
``sample_row`` int64[N], ``sample_turn`` int32[N], ``sample_key`` uint8[N,16]: source row, first
supervised turn and conversation key. ``sample_supervised`` int32[N]: supervised tokens.
``part_first_sample`` int64[P+1]: first sample of each part. ``part_number`` int64[P].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import zarr

from dspark.cache.canonical import sealed, unseal
from dspark.cache.files.checksum import of_bytes
from dspark.cache.files.layout import INDEX, INDEX_KEY, PartLayout, StoredArray
from dspark.cache.files.metadata import read_attributes, write_attributes
from dspark.cache.files.place import Place, in_parallel
from dspark.cache.parts.committed import bytes_of
from dspark.cache.parts.part import open_shard, write_array
from dspark.cache.parts.record import PartRecord
from dspark.cache.records import Array
from dspark.cache.typed_json import build

# The arrays of a part that the index is made from.
PART_ARRAYS = ("sample_start", "sample_last_start", "sample_row", "sample_key", "loss_mask")
TURN = "sample_turn"  # not in version 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRecord:
    """What ``index/`` says of itself: checksums of the parts' records, in their order, and of its
    arrays (none in version 1); bytes of each array in all parts, None where nobody noted them.
    """

    part_crc32c: list[int]
    array_crc32c: dict[str, int] | None = None
    bytes: dict[str, int] | None = None


def read_index_record(place: Place) -> IndexRecord:
    """Raises DamagedCacheError, also for values of a wrong type, or UnreadableError."""
    where = str(place.where(INDEX))
    return build(IndexRecord, unseal(read_attributes(place, INDEX).get(INDEX_KEY), where), where)


def build_index(parts: Iterable[Mapping[str, Array]], numbers: Sequence[int]) -> dict[str, Array]:
    """Build the index of a store from the ``PART_ARRAYS`` of its parts, in the order of their
    ``numbers``.
    """
    starts: list[Array] = [np.zeros(1, np.int64)]
    lasts: list[Array] = [np.zeros(1, np.int64)]
    rows: list[Array] = [np.zeros(0, np.int64)]
    keys: list[Array] = [np.zeros((0, 16), np.uint8)]
    supervised: list[Array] = [np.zeros(0, np.int32)]
    turns: list[Array] = [np.zeros(0, np.int32)]
    first = [0]
    tokens = stored = 0
    for part in parts:
        start, last = part["sample_start"], part["sample_last_start"]
        starts.append(start[1:] + tokens)
        lasts.append(last[1:] + stored)
        tokens, stored = tokens + int(start[-1]), stored + int(last[-1])
        rows.append(part["sample_row"])
        keys.append(part["sample_key"])
        turns.append(part.get(TURN, np.zeros(part["sample_row"].shape[0], np.int32)))
        labels = np.concatenate([[0], np.cumsum(part["loss_mask"], dtype=np.int64)])
        supervised.append(np.diff(labels[start]).astype(np.int32))
        first.append(first[-1] + part["sample_row"].shape[0])
    return {
        "sample_start": np.concatenate(starts),
        "sample_last_start": np.concatenate(lasts),
        "sample_row": np.concatenate(rows),
        TURN: np.concatenate(turns),
        "sample_key": np.concatenate(keys),
        "sample_supervised": np.concatenate(supervised),
        "part_first_sample": np.array(first, dtype=np.int64),
        "part_number": np.array(numbers, dtype=np.int64),
    }


def index_specs(index: Mapping[str, Array]) -> list[StoredArray]:
    """Describe how the index is stored: chunks of 65,536 samples."""
    return [
        StoredArray(
            name, data.shape, str(data.dtype), 65536, 0 if data.itemsize == 1 else data.itemsize
        )
        for name, data in index.items()
    ]


def index_shape(samples: int, parts: int) -> list[StoredArray]:
    """Describe, as ``index_specs`` does, how the index of a store of so many samples and parts is
    stored.
    """
    empty = build_index([], [])
    more = {"sample_start": 1, "sample_last_start": 1, "part_first_sample": 1}
    counts = {"part": parts, "sample": samples}
    shapes = {
        n: (counts[n.partition("_")[0]] + more.get(n, 0), *a.shape[1:]) for n, a in empty.items()
    }
    return [
        StoredArray(n, shapes[n], str(a.dtype), 65536, 0 if a.itemsize == 1 else a.itemsize)
        for n, a in empty.items()
    ]


def index_sums(index: Mapping[str, Array]) -> dict[str, int]:
    """Return the crc32c of the little-endian bytes of each array of the index."""
    return {
        n: of_bytes(np.ascontiguousarray(a, a.dtype.newbyteorder("<")))
        for n, a in sorted(index.items())
    }


def write_index(place: Place, records: Sequence[PartRecord], layout: PartLayout) -> None:
    """Write ``index/``, so that opening a large store reads a few files and not a folder per
    part.
    """

    def arrays(record: PartRecord) -> dict[str, Array]:
        specs = layout.small(record.tokens, record.samples, record.exact[0])
        return {
            s.name: open_shard(place, record, s).read(0, s.shape[0])
            if s.shape[0]
            else np.empty(s.shape, s.dtype)
            for s in specs
            if s.name in (*PART_ARRAYS, TURN)
        }

    if place.remote:
        parts: Iterable[dict[str, Array]] = in_parallel(arrays, list(records))
    else:
        parts = (arrays(record) for record in records)
    index = build_index(parts, [r.index for r in records])
    with place.replace(INDEX) as new:
        zarr.create_group(new, zarr_format=3)
        for spec in index_specs(index):
            write_array(new, spec, index[spec.name])
        body = {
            "part_crc32c": [sealed(r.to_json())["crc32c"] for r in records],
            "array_crc32c": index_sums(index),
            "bytes": bytes_of(records),
        }
        write_attributes(new, INDEX_KEY, sealed(body))
