"""One part on disk: a Zarr group with one shard file an array, and a sealed record of what it holds.

A part is written into a staging folder, fsynced and renamed: it is there whole or not at all. Its record lists every file with size and
crc32c, so that a missing shard (which Zarr would read as zeros) and a foreign file are found without decoding anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.abc.codec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from dspark.cache.errors import DamagedCacheError
from dspark.cache.files.atomic import STAGING, commit_folder, write_errors
from dspark.cache.files.checksum import crc32
from dspark.cache.files.layout import PART_KEY, PartLayout, StoredArray, part_name
from dspark.cache.files.shard import Pieces, chunk_rows, write_shard
from dspark.cache.manifest import Json, build, crc32c, sealed, unseal
from dspark.cache.records import CodedSample, TokenSample, last_rows

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRecord:
    """What a committed part holds: source rows ``[row_start, row_stop)``, counts, and its files as ``[bytes, crc32c, crc32]``.

    Every chunk of a file ends with its own crc32c, so the file's crc32c depends on the chunks' lengths and not on what a sound chunk holds; the
    crc32 (zlib's polynomial) does. Stores of older releases lack it.
    """

    index: int
    row_start: int
    row_stop: int
    samples: int
    tokens: int
    supervised_tokens: int
    last_rows: int
    truncated: int
    dropped: dict[str, int]
    files: dict[str, list[int]]

    def to_json(self) -> Json:
        return dataclasses.asdict(self)


def assemble(
    samples: Sequence[CodedSample], layout: PartLayout
) -> tuple[dict[str, Array], dict[str, Pieces]]:
    """The arrays of a part (see ``PartLayout.arrays``): the small ones joined along tokens, the states as pieces."""
    small, stored = join_tokens([s.tokens for s in samples])
    for s, rows in zip(samples, stored, strict=True):
        for name, own in layout.specs.items():
            n = {"token": s.tokens.input_ids.shape[0], "last": rows}[own.axis]
            assert s.states[name].shape[0] == n, (
                f"row {s.tokens.row}: {name} has {s.states[name].shape[0]} rows, not {n}"
            )
    states = {name: Pieces([s.states[name] for s in samples]) for name in layout.specs}
    for spec in layout.arrays(small["input_ids"].shape[0], len(samples), sum(stored)):
        got = small[spec.name] if spec.name in small else states[spec.name]
        assert (got.shape, got.dtype) == (spec.shape, np.dtype(spec.dtype)), (spec, got.shape, got.dtype)
    return small, states


def join_tokens(tokens: Sequence[TokenSample]) -> tuple[dict[str, Array], list[int]]:
    """The arrays of a part that are not states, and the number of stored last states of each sample."""
    stored = [int(last_rows(s.loss_mask).sum()) for s in tokens]
    return {
        "input_ids": np.concatenate([s.input_ids for s in tokens]),
        "loss_mask": np.concatenate([s.loss_mask for s in tokens]),
        "sample_start": np.cumsum([0, *(s.input_ids.shape[0] for s in tokens)], dtype=np.int64),
        "sample_last_start": np.cumsum([0, *stored], dtype=np.int64),
        "sample_row": np.array([s.row for s in tokens], dtype=np.int64),
        "sample_key": np.frombuffer(b"".join(s.key for s in tokens), dtype=np.uint8).reshape(-1, 16),
    }, stored


@dataclass(frozen=True, kw_only=True, slots=True)
class PartJob:
    """A part to be written below ``parts``, without its states. Can be sent to another process, where ``write`` finishes it."""

    parts: Path
    index: int
    arrays: dict[str, Array]
    specs: list[StoredArray]
    row_start: int
    row_stop: int
    dropped: dict[str, int]
    truncated: int

    @property
    def state_specs(self) -> list[StoredArray]:
        """The arrays that ``write`` needs."""
        return [s for s in self.specs if s.name not in self.arrays]

    def write(self, states: Mapping[str, Array | Pieces]) -> PartRecord:
        """Write and commit the part; nothing of it counts when it raises."""
        return write_part(
            self.parts,
            self.index,
            self.arrays,
            states,
            self.specs,
            row_start=self.row_start,
            row_stop=self.row_stop,
            dropped=self.dropped,
            truncated=self.truncated,
        )


def write_part(
    parts: Path,
    index: int,
    arrays: Mapping[str, Array],
    states: Mapping[str, Array | Pieces],
    specs: Sequence[StoredArray],
    *,
    row_start: int,
    row_stop: int,
    dropped: Mapping[str, int],
    truncated: int,
) -> PartRecord:
    """Write and commit part ``index`` below ``parts``; returns its record. Raises StoreWriteError, leaving nothing."""
    final = parts / part_name(index)
    staged = parts / (STAGING + part_name(index))
    with write_errors(final):
        if staged.exists():  # an earlier try of this very part; another part may be in the making beside it
            shutil.rmtree(staged)
        zarr.create_group(staged, zarr_format=3)
        for spec in specs:
            write_array(staged, spec, arrays[spec.name] if spec.name in arrays else states[spec.name])
        record = PartRecord(
            index=index,
            row_start=row_start,
            row_stop=row_stop,
            samples=arrays["sample_row"].shape[0],
            tokens=arrays["input_ids"].shape[0],
            supervised_tokens=int(arrays["loss_mask"].sum()),
            last_rows=int(arrays["sample_last_start"][-1]),
            truncated=truncated,
            dropped=dict(dropped),
            files={
                name: list(size_crc(staged / name)) for name in sorted(_files(staged)) if name != "zarr.json"
            },
        )
        write_attributes(staged, PART_KEY, sealed(record.to_json()))
    commit_folder(staged, final)
    return record


def write_array(group: Path, spec: StoredArray, data: Array | Pieces) -> None:
    """Create array ``spec`` in ``group`` and fill it. One shard file; every inner chunk is compressed (unless level 0) and carries a crc32c."""
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
        compressors=[packed, Crc32cCodec()] if spec.level else [Crc32cCodec()],
        fill_value=0,
        zarr_format=3,
    )
    if spec.shape[0]:
        write_shard(group / spec.name / shard_file(spec), spec, data)


def shard_file(spec: StoredArray) -> str:
    """The one shard of an array, relative to its folder: chunk key ``c/0/0...``, a zero an axis."""
    return "/".join(["c", *["0"] * len(spec.shape)])


def read_record(part: Path) -> PartRecord:
    """The sealed record of a committed part."""
    where = str(part / "zarr.json")
    record = build(PartRecord, unseal(read_attributes(part).get(PART_KEY), where), where)
    if part_name(record.index) != part.name:
        raise DamagedCacheError(f"{where}: the record is of part {record.index}, the folder is {part.name}")
    return record


def missing_files(part: Path, record: PartRecord) -> Iterator[str]:
    """A finding for each file of the part that is missing or has another size. Reads no data."""
    for name, (size, *_) in record.files.items():
        try:
            found = os.stat(part / name).st_size
        except OSError as error:
            yield f"{part / name}: {error.strerror}, expected {size} bytes"
            continue
        if found != size:
            yield f"{part / name}: found {found} bytes, expected {size}"


def read_attributes(group: Path) -> dict[str, Any]:
    """The attributes of a Zarr group, read from its zarr.json."""
    path = group / "zarr.json"
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedCacheError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DamagedCacheError(f"{path}: not JSON: {error}") from error
    attributes = data.get("attributes") if isinstance(data, dict) else None
    if not isinstance(attributes, dict):
        raise DamagedCacheError(f"{path}: no Zarr v3 group metadata found")
    return attributes


def write_attributes(group: Path, key: str, value: Json) -> None:
    """(Re)write a Zarr v3 group's metadata with one attribute, in place; the caller commits."""
    (group / "zarr.json").write_bytes(group_metadata(key, value))


def group_metadata(key: str, value: Json) -> bytes:
    """The zarr.json of a Zarr v3 group with one attribute."""
    data = {"zarr_format": 3, "node_type": "group", "attributes": {key: value}}
    return json.dumps(data, indent=1, ensure_ascii=False).encode()


def size_crc(path: Path) -> tuple[int, int, int]:
    """Size in bytes, crc32c and crc32 of a file."""
    size = crc = other = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            crc = crc32c(block, crc)
            other = crc32(block, other)
    return size, crc, other


def _files(root: Path) -> list[str]:
    return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
