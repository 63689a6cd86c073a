"""Rebuild a store's index and manifest from its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dspark.cache.canonical import sealed
from dspark.cache.errors import DamagedCacheError, MismatchError, NotACacheError, UsageError
from dspark.cache.files.calibration import stored_codec
from dspark.cache.files.layout import PARTS, PartLayout, part_name
from dspark.cache.files.place import Place, place_of
from dspark.cache.files.urls import Where
from dspark.cache.manifest import Counts, Manifest, SourceInfo, from_plan
from dspark.cache.parts.committed import check_whole, scan_parts, totals
from dspark.cache.parts.index import read_index_record, write_index
from dspark.cache.parts.record import PartRecord
from dspark.cache.stored_manifest import read_manifest, write_manifest


def rebuild(path: str | Where) -> Manifest:
    """Rebuild index and manifest from the parts, whatever state they are in; returns the manifest.
    A manifest that is missing, damaged or from another store than the parts is rebuilt from theirs;
    it is marked complete if a sound index lists exactly these parts, else ``--resume`` completes
    it. What only the manifest knows (a source's sha256, the limit on rows, the measured quality) is
    lost with it.
    """
    place = place_of(path)
    path = place.where("")
    there = place.remote or place.exists(PARTS)
    records = list(scan_parts(path).values()) if there else []
    if not records:
        raise DamagedCacheError(f"{path}: there is no part to rebuild index and manifest from")
    digest = records[0].plan_sha256
    if any(r.format_version == 1 for r in records):
        raise UsageError(
            f"{path}: stores of format version 1 cannot be repaired by this release. Repair it "
            "with the release that wrote it."
        )
    if other := [r for r in records if r.plan_sha256 != digest]:
        raise MismatchError(
            f"{path}: parts {part_name(records[0].index)} and {part_name(other[0].index)} have "
            f"different plans. dspark-tools verify {path} names the ones that do not "
            "match the manifest."
        )
    try:
        old: Manifest | None = read_manifest(path)
    except (DamagedCacheError, NotACacheError):
        old = None
    if old is None or old.format_version == 1 or old.digest() != digest:
        old = _lost(place, records)
    elif old.complete and (found := totals(records)) != old.counts:
        raise DamagedCacheError(
            f"{path}: the parts hold {found}, the manifest says {old.counts}: parts are missing. "
            f"Nothing was changed. Run dspark-tools verify --drop-damaged {path}, then "
            "the command that wrote the store with --resume."
        )
    if old.complete:
        check_whole(records, old, path)
        layout = PartLayout(stored_codec(place, old), len(old.layers), old.target.hidden_size)
        write_index(place, records, layout)
    counts = totals(records) if old.complete else Counts()
    manifest = dataclasses.replace(old, counts=counts)
    write_manifest(place, manifest)
    return manifest


def _lost(place: Place, records: Sequence[PartRecord]) -> Manifest:
    """Make a manifest from nothing but the parts."""
    names = {r.source: r.source_id for r in records}
    try:
        about = read_index_record(place)
        whole = about.part_crc32c == [sealed(r.to_json())["crc32c"] for r in records]
    except DamagedCacheError:
        whole = False
    return from_plan(
        records[0].plan,
        str(place.where("")),
        sources=[
            SourceInfo(id=names.get(i, ""), sha256=None, limit=None) for i in range(max(names) + 1)
        ],
        counts=Counts(),
        complete=whole,
        quality={},
        engine_version=next(iter(records[0].versions.values()), ""),
    )
