"""The sealed record of a part: what it holds, and the checksums of its files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark.cache.canonical import unseal
from dspark.cache.errors import DamagedCacheError, FormatVersionError
from dspark.cache.files.layout import PART_KEY, PARTS, SOURCE_STRIDE, part_name, shard_tag
from dspark.cache.files.metadata import read_attributes
from dspark.cache.files.place import Place
from dspark.cache.json_text import Json
from dspark.cache.manifest import FORMAT_VERSION, plan_digest
from dspark.cache.typed_json import build

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
