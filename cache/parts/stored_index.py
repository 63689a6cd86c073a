"""The index of a complete store, read and compared with its checksums and the manifest."""

from __future__ import annotations

import numpy as np

from dspark.cache.errors import DamagedCacheError
from dspark.cache.files.layout import INDEX, StoredArray
from dspark.cache.files.metadata import read_shape
from dspark.cache.files.place import Memory, Place, each_in_parallel
from dspark.cache.manifest import Manifest
from dspark.cache.parts.index import TURN, index_shape, index_sums, read_index_record
from dspark.cache.parts.part import shard_file
from dspark.cache.parts.shard import Shard
from dspark.cache.records import Array
from dspark.cache.stored_manifest import rebuild_hint


def stored_index(place: Place, manifest: Manifest) -> tuple[dict[str, Array], list[int]]:
    """Read the arrays of ``dspark.cache.parts.index`` from ``index/``, and the checksum of each
    part's record. Raises DamagedCacheError unless they have their checksums and the manifest's
    counts.
    """
    path = place.where(INDEX)
    remedy = (
        "Repair the store with the release that wrote it"
        if manifest.format_version == 1
        else rebuild_hint(place.where(""))
    )
    try:
        index, part_crc = _checked(place, manifest)
    except (DamagedCacheError, KeyError, IndexError) as error:
        raise DamagedCacheError(
            f"{path}: the sample index cannot be used: {error}. {remedy}"
        ) from error
    counts = manifest.counts
    expected = counts.tokens, counts.last_rows, counts.samples
    found = (
        int(index["sample_start"][-1]),
        int(index["sample_last_start"][-1]),
        index["sample_row"].shape[0],
    )
    if found != expected:
        raise DamagedCacheError(
            f"{path}: holds (tokens, last rows, samples) = {found}, the manifest counts "
            f"{expected}. {remedy}"
        )
    return index, part_crc


def _checked(place: Place, manifest: Manifest) -> tuple[dict[str, Array], list[int]]:
    """Read ``index/`` and compare its checksums."""
    about = read_index_record(place)
    specs = _specs(place, manifest, len(about.part_crc32c))
    if manifest.format_version == 1:
        # There is no checksum of the arrays: a missing shard would read as zeros in Zarr.
        for spec in specs:
            file = f"{INDEX}/{spec.name}/{shard_file(spec)}"
            if spec.shape[0] and not place.exists(file):
                raise DamagedCacheError(f"{place.where(INDEX) / spec.name}: its shard is missing")
    index = dict(each_in_parallel(place)(lambda s: (s.name, _array(place, s)), specs))
    if manifest.format_version == 1:
        index[TURN] = np.zeros(index["sample_row"].shape[0], np.int32)
        index["part_number"] = np.arange(len(about.part_crc32c))
    elif (found := index_sums(index)) != about.array_crc32c:
        raise DamagedCacheError(f"arrays have checksums {found}, expected {about.array_crc32c}")
    return index, about.part_crc32c


def _specs(place: Place, manifest: Manifest, parts: int) -> list[StoredArray]:
    """Describe the arrays of ``index/`` by the store's counts. The metadata of a local store must
    say the same: a checksum does not tell three numbers of 8 bytes from six of 4. Of a remote store
    they are not read, for every look is a request.
    """
    specs = index_shape(manifest.counts.samples, parts)
    if manifest.format_version == 1:
        specs = [s for s in specs if s.name not in (TURN, "part_number")]
    if not place.remote:
        for spec in specs:
            found = read_shape(place, f"{INDEX}/{spec.name}")
            if found != (spec.shape, spec.dtype):
                raise DamagedCacheError(
                    f"{spec.name} is {found[1]}{list(found[0])}, expected "
                    f"{spec.dtype}{list(spec.shape)} by the counts of the store"
                )
    return specs


def _array(place: Place, spec: StoredArray) -> Array:
    name = f"{INDEX}/{spec.name}/{shard_file(spec)}"
    if not spec.shape[0]:
        return np.empty(spec.shape, spec.dtype)
    # In one piece if every read is a request.
    file = (lambda: Memory(place.read(name))) if place.remote else None
    return Shard(place.where(name), spec, file=file).read(0, spec.shape[0])
