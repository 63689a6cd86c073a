"""``dspark-tools verify``: every checksum and every count of a store. Reads everything once,
decodes every chunk, names what is damaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dspark.cache.errors import (
    CacheError,
    DamagedCacheError,
    UnreadableError,
    UsageError,
    read_error,
    reading,
)
from dspark.cache.files.calibration import stored_codec
from dspark.cache.files.layout import (
    CALIBRATION,
    INDEX,
    PARTS,
    SOURCE_STRIDE,
    TARGET,
    PartLayout,
    part_name,
)
from dspark.cache.files.place import Place, place_of, refuse_links
from dspark.cache.files.urls import Where
from dspark.cache.manifest import Manifest
from dspark.cache.parts.index import build_index
from dspark.cache.parts.record import PartRecord
from dspark.cache.reader import Cache
from dspark.cache.records import Array
from dspark.cache.shared.host_cores import cores
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.stores.verify_part import Checked, Report, check_part
from dspark.cache.target.files import damaged_files, what_to_do
from dspark.cache.writer import StoreWriter


def verify(
    path: str | Where,
    progress: Callable[[int, int], None] = lambda done, total: None,
    workers: int | None = None,
) -> Report:
    """Check the store at ``path``. ``progress(done, total)`` is called once per part; ``workers``
    parts are checked at once (None = one per core, at most eight).

    Raises only if it is not a store at all, or its manifest is damaged or unreadable.
    """
    place = place_of(path)
    path = place.where("")
    manifest = read_manifest(path)
    report = Report()
    try:
        if isinstance(path, Path):
            refuse_links(path)
        with reading(path / PARTS):
            names = [n for n in place.list(PARTS) if n.isdigit()]
    except (DamagedCacheError, UnreadableError) as error:
        report.findings.append(str(error))
        report.unreadable.update([PARTS] if isinstance(error, UnreadableError) else [])
        return report
    for name in _stray_parts(manifest, names):
        names.remove(name)
        report.findings.append(
            f"{path / PARTS / name}: a part of a source that the manifest does not list: "
            "dspark-tools append was stopped. The store is whole without it. Repeat that command, "
            f"or run dspark-tools verify --drop-damaged {path}"
        )
        report.stray.add(name)
        report.damaged.add(name)
    for name in _missing_parts(place, manifest, names):
        report.findings.append(f"{path / PARTS / name}: the part is missing")
        report.damaged.add(name)
    try:
        codec = stored_codec(place, manifest)
    except (DamagedCacheError, UnreadableError) as error:  # no part can be checked without it
        report.findings.append(str(error))
        report.unreadable.update([CALIBRATION] if isinstance(error, UnreadableError) else [])
        return report
    layout = PartLayout(codec, len(manifest.layers), manifest.target.hidden_size)
    small: list[dict[str, Array]] = []
    records: list[PartRecord] = []
    foreign: list[str] = []
    digest = manifest.digest()

    def one(name: str) -> Checked:
        return check_part(place, name, manifest, digest, layout)

    # Reading, checksums and decompression release Python's lock.
    with ThreadPoolExecutor(workers or min(8, cores()), thread_name_prefix="verify") as pool:
        for done, (name, own) in enumerate(zip(names, pool.map(one, names), strict=True)):
            report.findings += own.report.findings
            report.checked_chunks += own.report.checked_chunks
            report.unreadable |= own.report.unreadable
            if own.foreign:
                foreign.append(name)
            if own.record is not None:
                records.append(own.record)
                small.append(own.small)
            if own.report.findings and name not in (*report.unreadable, *foreign):
                report.damaged.add(name)
            report.checked_parts += 1
            progress(done + 1, len(names))
    if foreign and len(foreign) == len(names):  # then the manifest belongs to another store
        report.findings.append(
            f"{path / 'zarr.json'}: no part has the manifest's plan. Restore the store's own "
            f"zarr.json, or run dspark-tools verify --rebuild-index {path}"
        )
    else:
        report.damaged.update(foreign)
    if report.damaged == report.stray and len(report.findings) == len(report.stray):
        try:
            report.findings += _check_totals(path, manifest, records, small)
        except UnreadableError as error:
            report.findings.append(str(error))
            report.unreadable.add(INDEX)
    try:
        with place.local(TARGET) as folder:
            for name, finding in damaged_files(folder, manifest).items():
                found = finding.replace(str(folder), str(path / TARGET))
                report.findings.append(f"{found}. {what_to_do(path)}")
                report.damaged.add(f"{TARGET}/{name}")
    except OSError as error:
        report.findings.append(str(read_error(path / TARGET, error)))
        report.unreadable.add(TARGET)
    except UnreadableError as error:
        report.findings.append(str(error))
        report.unreadable.add(TARGET)
    return report


def _missing_parts(place: Place, manifest: Manifest, found: list[str]) -> list[str]:
    """Return the names of parts that should exist."""
    if manifest.format_version == 1:
        count = manifest.counts.parts if manifest.complete else len(found)
        return [n for i in range(max(count, len(found))) if (n := part_name(i, 1)) not in found]
    if not manifest.complete:
        return []
    try:
        there = set(found)
        wanted = Cache(place.where(""), manifest).index["part_number"]
        return [n for i in wanted.tolist() if (n := part_name(i)) not in there]
    except CacheError:  # reported where the index is checked
        return []


def _stray_parts(manifest: Manifest, found: list[str]) -> list[str]:
    """Return the names of parts that no source of a complete store has."""
    if manifest.format_version == 1 or not manifest.complete:
        return []
    return [n for n in found if int(n) // SOURCE_STRIDE >= len(manifest.sources)]


def _check_totals(
    path: Where, manifest: Manifest, records: list[PartRecord], small: list[dict[str, Array]]
) -> Iterator[str]:
    for a, b in itertools.pairwise(records):
        if (
            a.source == b.source
            and a.row_stop != b.row_start
            and (manifest.complete or a.format_version == 1)
        ):
            yield (
                f"{path}: part {a.index} ends at source row {a.row_stop}, part {b.index} begins "
                f"at {b.row_start}"
            )
    if not manifest.complete:
        return
    counts = manifest.counts
    for name in ("samples", "tokens", "supervised_tokens", "last_rows"):
        if (found := sum(getattr(r, name) for r in records)) != getattr(counts, name):
            yield (
                f"{path}: the parts hold {found} {name}, the manifest says {getattr(counts, name)}"
            )
    cache = Cache(path, manifest)
    try:
        index = cache.index
        for i in range(cache.parts):
            cache.record(i)
    except UnreadableError:
        raise
    except CacheError as error:
        yield str(error)
        return
    for name, data in build_index(small, [r.index for r in records]).items():
        if not np.array_equal(index[name], data):
            yield f"{path / INDEX / name}: differs from what the parts hold"


def drop_damaged(path: str | Where, report: Report) -> list[str]:
    """Delete what is damaged and mark the store incomplete; ``dspark-dump --resume`` then rewrites
    exactly that. Returns the deleted names. What is unreadable is not touched. Raises
    DamagedCacheError, deleting nothing, if a link would lead out of the store.
    """
    place = place_of(path)
    path = place.where("")
    if isinstance(path, Path):
        refuse_links(path)
    if read_manifest(path).format_version == 1 and report.damaged:
        raise UsageError(
            f"{path}: stores of format version 1 cannot be repaired by this release. Repair it "
            "with the release that wrote it, then convert it with dspark-tools recode."
        )
    for name in sorted(report.damaged):
        place.remove(name if name.startswith(f"{TARGET}/") else f"{PARTS}/{name}")
    if report.damaged - report.stray:
        StoreWriter(path, read_manifest(path), {}).reopen()
    return sorted(report.damaged)
