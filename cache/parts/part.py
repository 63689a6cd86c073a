"""One part on disk: a Zarr group with one shard file per array, and a sealed record of what it
holds.

A part exists completely or not at all. It holds the samples of a block of source rows, which any
writer can make independently. Its record contains the store's whole plan and lists every object
with size, checksums and place, so that a missing shard (which Zarr would read as zeros) or a
foreign file is found without decoding anything. Each shard begins with a tag of plan, part and
array, so that a swapped one is found when it is opened.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
import zarr.abc.codec
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec, ZstdCodec

from dspark.cache.canonical import sealed
from dspark.cache.codec.base import EXACT_TOKEN, ArraySpec
from dspark.cache.errors import GONE, DamagedCacheError, read_error
from dspark.cache.files.checksum import file_sums
from dspark.cache.files.layout import (
    EXACT_POSITION,
    EXACT_ROW,
    EXACT_START,
    PART_KEY,
    PARTS,
    PartLayout,
    StoredArray,
    part_name,
    shard_tag,
    state_array,
)
from dspark.cache.files.metadata import write_attributes
from dspark.cache.files.place import Place
from dspark.cache.json_text import Json
from dspark.cache.parts.arrays import store_once, tokens_sha256
from dspark.cache.parts.chunks import chunk_rows
from dspark.cache.parts.record import TOKENS_IN_TAG, Block, PartRecord
from dspark.cache.parts.shard import Shard
from dspark.cache.parts.shard_writer import Pieces, write_shard
from dspark.cache.records import Array

# Of a part that is written: one alone leaves cores idle while its file takes what they compressed.
ARRAYS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PartJob:
    """Part ``index`` of the store at ``place``, without its states. Can be sent to another process,
    where ``write`` finishes it.

    ``specs``: its arrays except those of exactly stored tokens, which ``exact`` describes.
    ``token``: identifies the writer.
    """

    place: Place
    index: int
    arrays: dict[str, Array]
    specs: list[StoredArray]
    exact: dict[str, ArraySpec]
    block: Block
    plan: Json
    plan_sha256: str
    token: str = ""

    @property
    def state_specs(self) -> list[StoredArray]:
        """Return the arrays that ``write`` needs, beside those of exactly stored tokens."""
        made = {*self.arrays, EXACT_START, EXACT_POSITION, EXACT_ROW}
        return [s for s in self.specs if s.name not in made]

    def write(self, states: Mapping[str, Array | Pieces]) -> PartRecord:
        """Write and commit the part; returns its record. Raises StoreWriteError, leaving nothing
        behind. If the codec stores tokens exactly, ``states`` also holds ``EXACT_TOKEN`` int64[X]
        counted from the part's first token, and their rows.
        """
        arrays: dict[str, Array | Pieces] = {**self.arrays, **states}
        specs, exact = list(self.specs), [0, 0]
        if self.exact:
            made = store_once(
                {n: np.asarray(states[n][:]) for n in (EXACT_TOKEN, *self.exact)},
                self.arrays["sample_start"],
            )
            arrays |= made
            distinct = made[next(iter(self.exact))].shape[0]
            exact = [made[EXACT_ROW].shape[0], distinct]
            specs = [_sized(s, made) for s in specs]
            specs += [state_array(n, (distinct, *s.row_shape), s) for n, s in self.exact.items()]
        name = f"{PARTS}/{part_name(self.index)}"
        tokens = tokens_sha256(self.arrays)
        with self.place.commit(name, self.token) as folder:
            zarr.create_group(folder, zarr_format=3)
            shards = self._write_arrays(folder, specs, arrays, tokens)
            record = PartRecord(
                index=self.index,
                **{f.name: getattr(self.block, f.name) for f in dataclasses.fields(Block)},
                samples=self.arrays["sample_row"].shape[0],
                tokens=self.arrays["input_ids"].shape[0],
                supervised_tokens=int(self.arrays["loss_mask"].sum()),
                last_rows=int(self.arrays["sample_last_start"][-1]),
                files={
                    n: list(shards.get(n) or file_sums(folder / n))
                    for n in sorted(_files(folder))
                    if n != "zarr.json"
                },
                exact=exact,
                plan=self.plan,
                plan_sha256=self.plan_sha256,
                features=[TOKENS_IN_TAG],
                tokens_sha256=tokens,
            )
            write_attributes(folder, PART_KEY, sealed(record.to_json()))
        return record

    def _write_arrays(
        self,
        folder: Path,
        specs: Sequence[StoredArray],
        arrays: Mapping[str, Array | Pieces],
        tokens: str,
    ) -> dict[str, tuple[int, int, int]]:
        """Write all arrays, several at once, largest first: each is written to its file by one
        thread. Returns the sums of the shard files.
        """

        def one(spec: StoredArray) -> tuple[str, tuple[int, int, int] | None]:
            tag = shard_tag(self.plan_sha256, self.index, spec.name, tokens)
            local = not self.place.remote
            sums = write_array(folder, spec, arrays[spec.name], tag, to_disk=local)
            return f"{spec.name}/{shard_file(spec)}", sums

        order = sorted(specs, key=lambda s: -math.prod(s.shape) * np.dtype(s.dtype).itemsize)
        with ThreadPoolExecutor(ARRAYS_AT_ONCE, "dspark-array") as threads:
            return {name: sums for name, sums in threads.map(one, order) if sums is not None}


def _sized(spec: StoredArray, made: Mapping[str, Array]) -> StoredArray:
    """Return ``spec`` with the shape of the given array."""
    return dataclasses.replace(spec, shape=made[spec.name].shape) if spec.name in made else spec


def write_array(
    group: Path,
    spec: StoredArray,
    data: Array | Pieces,
    tag: bytes = b"",
    *,
    to_disk: bool = False,
) -> tuple[int, int, int] | None:
    """Create array ``spec`` in ``group`` and fill it. One shard file; every inner chunk is
    compressed (unless level 0) and carries a crc32c. ``tag``: what the file begins with;
    ``to_disk``: see ``write_shard``. Returns the file's ``file_sums``; None for an array without
    rows, which has no file.
    """
    chunk = chunk_rows(spec)
    shards = (-(-max(1, spec.shape[0]) // chunk) * chunk, *spec.shape[1:])
    packed: zarr.abc.codec.BytesBytesCodec = (
        BloscCodec(cname="zstd", clevel=spec.level, shuffle="shuffle", typesize=spec.shuffle)
        if spec.shuffle
        else ZstdCodec(level=spec.level)
    )
    zarr.create_array(
        group,
        name=spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=(chunk, *spec.shape[1:]),
        shards=shards,
        filters=[TransposeCodec(order=(*range(1, len(spec.shape)), 0))] if spec.columns else None,
        compressors=[packed, Crc32cCodec()] if spec.level else [Crc32cCodec()],
        fill_value=0,
        zarr_format=3,
    )
    if not spec.shape[0]:
        return None
    return write_shard(group / spec.name / shard_file(spec), spec, data, tag, to_disk=to_disk)


def shard_file(spec: StoredArray) -> str:
    """Return the one shard of an array, relative to its folder: chunk key ``c/0/0...``, one zero
    per axis.
    """
    return "/".join(["c", *["0"] * len(spec.shape)])


def part_specs(layout: PartLayout, record: PartRecord) -> list[StoredArray]:
    """Return every array of a committed part."""
    exact = record.exact[0], record.exact[1]
    return layout.arrays(
        record.tokens, record.samples, record.last_rows, exact, record.format_version
    )


def missing_files(place: Place, record: PartRecord) -> Iterator[str]:
    """Yield a finding for each file of the part that is missing or has another size. Reads no data.
    Raises UnreadableError.
    """
    part = f"{PARTS}/{part_name(record.index, record.format_version)}"
    known = place.sizes(part) if place.remote else None  # one request instead of dozens
    for name, (size, *_) in record.files.items():
        path = place.where(f"{part}/{name}")
        try:
            found = place.size(f"{part}/{name}") if known is None else known.get(name)
        except OSError as error:
            if error.errno not in GONE:
                raise read_error(path, error) from error
            yield f"{path}: {error.strerror}, expected {size} bytes"
            continue
        if found is None:
            yield f"{path}: no such object, expected {size} bytes"
        elif found != size:
            yield f"{path}: found {found} bytes, expected {size}"


def open_shard(place: Place, record: PartRecord, spec: StoredArray) -> Shard:
    """Open the shard of array ``spec`` of a committed part, for reading."""
    file = f"{spec.name}/{shard_file(spec)}"
    name = f"{PARTS}/{part_name(record.index, record.format_version)}/{file}"
    if file not in record.files:
        raise DamagedCacheError(f"{place.where(name)}: the part's record does not list it")
    size, *sums = record.files[file]
    version = "-".join(map(str, (size, *sums)))
    return Shard(
        place.where(name), spec, record.tag(spec.name), lambda: place.open(name, size, version)
    )


def _files(root: Path) -> list[str]:
    return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
