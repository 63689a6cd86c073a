"""The shards of a part, opened for reading."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping, Sequence

from dspark.cache.errors import DamagedCacheError
from dspark.cache.files.layout import PartLayout, StoredArray
from dspark.cache.files.place import Place
from dspark.cache.parts.part import missing_files, open_shard, part_specs
from dspark.cache.parts.record import PartRecord
from dspark.cache.parts.shard import Shard

OPEN_PARTS = 48  # maximum parts kept open, with a file descriptor per array


def open_parts(arrays: int) -> int:
    """Return how many parts with ``arrays`` arrays each to keep open: half of the process's limit
    on open files.
    """
    return max(
        1, min(OPEN_PARTS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 // max(arrays, 1))
    )


def open_part(place: Place, layout: PartLayout, record: PartRecord) -> Mapping[str, Shard]:
    """Open every array of a committed part that has rows. Raises DamagedCacheError if a file is
    missing or cut short; for a remote store, when the array is first used.
    """
    specs = [s for s in part_specs(layout, record) if s.shape[0]]
    if place.remote:  # opened one by one, when they are read: each takes requests
        return Shards(place, record, specs)
    for finding in missing_files(place, record):
        raise DamagedCacheError(f"{finding}. Run dspark-tools verify {place.where('')}")
    return {s.name: open_shard(place, record, s) for s in specs}


class Shards(Mapping[str, Shard]):
    """The shards of a part of a remote store, each opened when first used. Thread-safe."""

    def __init__(self, place: Place, record: PartRecord, specs: Sequence[StoredArray]) -> None:
        self._place, self._record = place, record
        self._specs = {s.name: s for s in specs}
        self._open: dict[str, Shard] = {}

    def __getitem__(self, name: str) -> Shard:
        if name not in self._open:
            self._open[name] = open_shard(self._place, self._record, self._specs[name])
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)
