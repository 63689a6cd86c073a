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
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.abc.codec
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec, ZstdCodec

from dspark.cache.codec.base import EXACT_TOKEN, ArraySpec
from dspark.cache.errors import GONE, DamagedCacheError, FormatVersionError, read_error
from dspark.cache.files.checksum import file_sums
from dspark.cache.files.layout import (
    EXACT_POSITION,
    EXACT_ROW,
    EXACT_START,
    PART_KEY,
    PARTS,
    SOURCE_STRIDE,
    PartLayout,
    StoredArray,
    part_name,
    shard_tag,
    state_array,
)
from dspark.cache.files.metadata import read_attributes, write_attributes
from dspark.cache.files.place import Place
from dspark.cache.manifest import FORMAT_VERSION, Json, build, plan_digest, sealed, unseal
from dspark.cache.parts.shard import Pieces, Shard, chunk_rows, write_shard
from dspark.cache.records import Array, CodedSample, TokenSample, last_rows

# Of a part that is written: one alone leaves cores idle while its file takes what they compressed.
ARRAYS_AT_ONCE = 4
TOKENS_IN_TAG = "tokens-in-tag"
FEATURES: frozenset[str] = frozenset(
    {TOKENS_IN_TAG}
)  # features added to format version 2 that this release knows


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The rows a part is made of: ``[row_start, row_stop)`` of source number ``source``, their
    ``rows_sha256`` (None = unknown, as after ``recode`` of a version 1 store), and what became of
    them.
    """

    row_start: int
    row_stop: int
    dropped: dict[str, int]
    truncated: int
    source: int = 0
    source_id: str = ""
    rows_sha256: str | None = None
    # of what made it; may differ from part to part
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRecord:
    """What a committed part holds. ``files``: its objects except its own metadata, as ``[bytes,
    crc32c, crc32]`` by their place within the part.

    Every chunk of a file ends with its own crc32c, so the file's crc32c depends on the chunks'
    lengths but not on what a valid chunk holds; the crc32 (zlib's polynomial) does. ``plan`` and
    ``plan_sha256``: the store's, empty in version 1.
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
    source: int = 0
    source_id: str = ""
    rows_sha256: str | None = None
    # tokens stored exactly, different rows of them
    exact: list[int] = field(default_factory=lambda: [0, 0])
    features: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    plan: Json = field(default_factory=dict)
    plan_sha256: str = ""
    tokens_sha256: str = ""  # of the tokens that the states belong to: see ``tokens_sha256``
    format_version: int = FORMAT_VERSION

    @property
    def block(self) -> int:
        """Return the number of the block within its source."""
        return self.index % SOURCE_STRIDE

    def tag(self, array: str) -> bytes:
        """Return what the shard of ``array`` begins with."""
        if self.format_version == 1:
            return b""
        return shard_tag(self.plan_sha256, self.index, array, self.tokens_sha256)

    def to_json(self) -> Json:
        out = dataclasses.asdict(self)
        if self.format_version == 1:
            return {k: out[k] for k in VERSION_1_KEYS}
        if TOKENS_IN_TAG not in self.features:
            del out["tokens_sha256"]
        out["files"] = {
            name: {"bytes": size, "crc32c": crc, "crc32": other, "place": name}
            for name, (size, crc, other) in self.files.items()
        }
        return out


VERSION_1_KEYS = (
    "index",
    "row_start",
    "row_stop",
    "samples",
    "tokens",
    "supervised_tokens",
    "last_rows",
    "truncated",
    "dropped",
    "files",
)


def record_from(data: Any, where: str) -> PartRecord:
    """Parse a sealed record of either version."""
    body = unseal(data, where)
    if "format_version" not in body:
        return build(PartRecord, {**body, "format_version": 1}, where)
    if body["format_version"] != FORMAT_VERSION:
        raise FormatVersionError(f"{where}: a part of format version {body['format_version']!r}")
    features = body.get("features", [])
    if not isinstance(features, list) or not all(isinstance(f, str) for f in features):
        raise DamagedCacheError(f"{where}: features is no list of names")
    unknown = sorted(set(features) - FEATURES)
    if unknown:
        raise FormatVersionError(
            f"{where}: the part uses {unknown}, which this release does not read. Use the dspark "
            "release that wrote the store."
        )
    files = body.get("files")
    if not isinstance(files, dict):
        raise DamagedCacheError(f"{where}: the record lists no files")
    for name, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "crc32c", "crc32", "place"}:
            raise DamagedCacheError(f"{where}: object {name}: found {entry}")
        if entry["place"] != name:
            raise FormatVersionError(
                f"{where}: object {name} is at {entry['place']!r}, where no local store keeps one"
            )
    plain = {n: [e["bytes"], e["crc32c"], e["crc32"]] for n, e in files.items()}
    record = build(PartRecord, {**body, "files": plain}, where)
    counts = (
        record.index,
        record.row_start,
        record.samples,
        record.tokens,
        record.last_rows,
        *record.exact,
    )
    if min(counts) < 0 or len(record.exact) != 2 or record.last_rows > record.tokens:
        raise DamagedCacheError(f"{where}: counts that no part can have: {counts}")
    if (TOKENS_IN_TAG in record.features) != bool(record.tokens_sha256):
        raise DamagedCacheError(
            f"{where}: found tokens_sha256 without its feature, or the feature without "
            "tokens_sha256"
        )
    if plan_digest(record.plan) != record.plan_sha256:
        raise DamagedCacheError(f"{where}: the plan does not match plan_sha256")
    return record


def assemble(
    samples: Sequence[CodedSample], layout: PartLayout
) -> tuple[dict[str, Array], dict[str, Array | Pieces]]:
    """Assemble the arrays of a part: tokens and samples joined along tokens, states as pieces."""
    small, stored = join_tokens([s.tokens for s in samples])
    states: dict[str, Array | Pieces] = {}
    for spec in layout.states(small["input_ids"].shape[0], sum(stored)):
        own, counts = layout.specs[spec.name], [len(s.tokens.input_ids) for s in samples]
        for s, n in zip(samples, counts if own.axis == "token" else stored, strict=True):
            found = s.states[spec.name]
            assert found.shape[0] == n, (
                f"row {s.tokens.row}: {spec.name} has {found.shape[0]} rows, not {n}"
            )
        pieces = [s.states[spec.name] for s in samples]
        got: Array | Pieces = Pieces(pieces) if pieces else np.empty(spec.shape, spec.dtype)
        assert (got.shape, got.dtype) == (spec.shape, np.dtype(spec.dtype)), (
            spec,
            got.shape,
            got.dtype,
        )
        states[spec.name] = got
    for name, own in layout.exact.items():
        rows = [s.states[name] for s in samples]
        states[name] = np.concatenate([np.empty((0, *own.row_shape), own.dtype), *rows])
    if layout.exact:
        at = zip(samples, small["sample_start"][:-1], strict=True)
        states[EXACT_TOKEN] = np.concatenate(
            [np.zeros(0, np.int64), *(s.states[EXACT_TOKEN] + n for s, n in at)]
        )
    return small, states


def join_tokens(tokens: Sequence[TokenSample]) -> tuple[dict[str, Array], list[int]]:
    """Return the arrays of a part that are not states, and the number of stored last states of each
    sample.
    """
    stored = [int(last_rows(s.loss_mask).sum()) for s in tokens]
    return {
        "input_ids": np.concatenate([np.zeros(0, np.int32), *(s.input_ids for s in tokens)]),
        "loss_mask": np.concatenate([np.zeros(0, np.bool_), *(s.loss_mask for s in tokens)]),
        "sample_start": np.cumsum([0, *(s.input_ids.shape[0] for s in tokens)], dtype=np.int64),
        "sample_last_start": np.cumsum([0, *stored], dtype=np.int64),
        "sample_row": np.array([s.row for s in tokens], dtype=np.int64),
        "sample_key": np.frombuffer(b"".join(s.key for s in tokens), dtype=np.uint8).reshape(
            -1, 16
        ),
        "sample_turn": np.array([s.turn for s in tokens], dtype=np.int32),
    }, stored


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


def tokens_sha256(arrays: Mapping[str, Array]) -> str:
    """Return the sha256 over the arrays of a part that are not states, sorted by name, each with
    its name: ids, masks, and where samples begin and come from.
    """
    out = hashlib.sha256()
    for name in sorted(arrays):
        out.update(name.encode() + b"\0" + np.ascontiguousarray(arrays[name]).tobytes())
    return out.hexdigest()


def _sized(spec: StoredArray, made: Mapping[str, Array]) -> StoredArray:
    """Return ``spec`` with the shape of the given array."""
    return dataclasses.replace(spec, shape=made[spec.name].shape) if spec.name in made else spec


def store_once(states: Mapping[str, Array], sample_start: Array) -> dict[str, Array]:
    """Store exact tokens as a part keeps them: equal rows once, in order of first occurrence.
    ``states``: ascending ``EXACT_TOKEN`` [X], and arrays of X rows. Returns the arrays with only
    the distinct rows; and, per sample, where its exact tokens begin, and per exact token its
    position within the sample and its row.
    """
    token = states[EXACT_TOKEN].astype(np.int64)
    rows = {n: a for n, a in states.items() if n != EXACT_TOKEN}
    number: dict[bytes, int] = {}
    row = np.zeros(len(token), np.int32)
    first: list[int] = []
    for i in range(len(token)):
        key = b"".join(np.ascontiguousarray(a[i]).tobytes() for a in rows.values())
        if key not in number:
            number[key] = len(first)
            first.append(i)
        row[i] = number[key]
    start = np.searchsorted(token, sample_start).astype(np.int64)
    sample = np.searchsorted(sample_start, token, side="right") - 1
    position = (token - sample_start[sample]).astype(np.int32) if len(token) else row
    return {n: a[first] for n, a in rows.items()} | {
        EXACT_START: start,
        EXACT_POSITION: position,
        EXACT_ROW: row,
    }


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


def read_record(place: Place, name: str) -> PartRecord:
    """Read the sealed record of the committed part whose folder is called ``name``."""
    part = place.where(f"{PARTS}/{name}")
    where = str(part / "zarr.json")
    if isinstance(part, Path) and part.is_symlink():
        raise DamagedCacheError(f"{part}: a link. A store contains no links.")
    record = record_from(read_attributes(place, f"{PARTS}/{name}").get(PART_KEY), where)
    if part_name(record.index, record.format_version) != name:
        raise DamagedCacheError(
            f"{where}: the record is for part {record.index}, but the folder is {name}"
        )
    return record


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
