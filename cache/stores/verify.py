"""``dspark-tools verify``: every checksum and every count of a store. Reads everything once,
decodes every chunk, names what is damaged.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dspark.cache.errors import (
    CacheError,
    DamagedCacheError,
    MismatchError,
    UnreadableError,
    UsageError,
    read_error,
    reading,
)
from dspark.cache.files.calibration import stored_codec
from dspark.cache.files.checksum import file_sums
from dspark.cache.files.layout import (
    CALIBRATION,
    INDEX,
    PARTS,
    SOURCE_STRIDE,
    TARGET,
    PartLayout,
    StoredArray,
    part_name,
)
from dspark.cache.files.metadata import read_shape
from dspark.cache.files.place import Folder, Place, place_of, refuse_links
from dspark.cache.files.urls import Where
from dspark.cache.manifest import Manifest
from dspark.cache.parts.arrays import tokens_sha256
from dspark.cache.parts.index import PART_ARRAYS, TURN, build_index
from dspark.cache.parts.part import missing_files, part_specs, shard_file
from dspark.cache.parts.record import PartRecord, read_record
from dspark.cache.parts.shard import Shard
from dspark.cache.reader import Cache
from dspark.cache.records import Array, last_rows
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.target.files import damaged_files, what_to_do
from dspark.cache.writer import StoreWriter


@dataclass(slots=True)
class Report:
    """``findings``: one sentence each; empty = sound. ``damaged``: what must be rewritten: parts by
    name, and files as ``target/NAME``. ``unreadable``: what could not be read now (an I/O error, no
    permission, too few file handles) and may be intact. ``stray``: of ``damaged``, parts that the
    store is whole without.
    """

    checked_chunks: int = 0
    checked_parts: int = 0
    findings: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    stray: set[str] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def verdict(self) -> str:
        """``sound``, ``UNREADABLE`` if that is all that was found, or ``DAMAGED``."""
        if self.ok:
            return "sound"
        return "UNREADABLE" if self.unreadable and not self.damaged else "DAMAGED"


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
        return _check(place, name, manifest, digest, layout)

    # Reading, checksums and decompression release Python's lock.
    with ThreadPoolExecutor(
        workers or min(8, os.cpu_count() or 1), thread_name_prefix="verify"
    ) as pool:
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


class ForeignPart(MismatchError):
    """A part that belongs to another plan than the store's."""


@dataclass(slots=True)
class Checked:
    """What was found in one part: its record and small arrays, if they could be read."""

    report: Report = field(default_factory=Report)
    record: PartRecord | None = None
    small: dict[str, Array] = field(default_factory=dict)
    foreign: bool = False


def _check(place: Place, name: str, manifest: Manifest, digest: str, layout: PartLayout) -> Checked:
    """Check one part; for a remote store, a copy made for the check."""
    out = Checked()
    where = place.where(f"{PARTS}/{name}")
    try:
        with place.local(f"{PARTS}/{name}") as folder:
            try:
                checked = _check_part(folder, manifest, digest, layout, out.report)
                if checked is not None:
                    out.record, out.small = checked
            finally:
                said = [text.replace(str(folder), str(where)) for text in out.report.findings]
                out.report.findings = said
    except (UnreadableError, OSError) as error:
        if isinstance(error, OSError):
            error = UnreadableError(str(read_error(where, error)))
        if not out.report.findings:
            out.report.unreadable.add(name)
        out.report.findings.append(str(error))
    except ForeignPart as error:
        out.report.findings.append(str(error).replace(str(folder), str(where)))
        out.foreign = True
    return out


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


def _check_part(
    folder: Path, manifest: Manifest, digest: str, layout: PartLayout, report: Report
) -> tuple[PartRecord, dict[str, Array]] | None:
    """Check one part; findings go into ``report``. Returns its record and its small arrays if they
    could be read.
    """
    place = Folder(folder.parent.parent)
    try:
        record = read_record(place, folder.name)
    except UnreadableError:
        raise
    except CacheError as error:
        report.findings.append(str(error))
        return None
    absent = list(missing_files(place, record))
    report.findings += absent
    for name, (size, *sums) in record.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            continue  # said above
        found = file_sums(file)[1:]
        if found[: len(sums)] != tuple(sums):
            report.findings.append(
                f"{file}: the file's checksums are {list(found)}, the record says {sums}"
            )
    for extra in sorted(
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        - set(record.files)
        - {"zarr.json"}
    ):
        report.findings.append(f"{folder / extra}: a file that the part's record does not list")
    if absent:
        return None
    if record.format_version != manifest.format_version or (
        record.format_version > 1 and record.plan_sha256 != digest
    ):
        raise ForeignPart(f"{folder}: this part belongs to another plan than the store's")
    specs = part_specs(layout, record)
    small: dict[str, Array] = {}
    for spec in specs:
        try:
            found_shape, found_kind = read_shape(place, f"{PARTS}/{folder.name}/{spec.name}")
        except DamagedCacheError as error:
            report.findings.append(str(error))
            continue
        if (found_shape, found_kind) != (spec.shape, spec.dtype):
            report.findings.append(
                f"{folder / spec.name}: is {found_kind}{found_shape}, the counts say "
                f"{spec.dtype}{spec.shape}"
            )
            continue
        pieces = (
            list(_check_chunks(folder / spec.name, spec, record.tag(spec.name), report))
            if spec.shape[0]
            else []
        )
        if spec.name in (*PART_ARRAYS, "input_ids", TURN):
            small[spec.name] = np.concatenate([np.empty((0, *spec.shape[1:]), spec.dtype), *pieces])
    if record.tokens_sha256 and tokens_sha256(small) != record.tokens_sha256:
        report.findings.append(f"{folder}: tokens and masks do not match tokens_sha256")
    if not any(str(folder) in finding for finding in report.findings):
        report.findings += [
            f"{folder}: {text}" for text in _check_counts(record, small, manifest.target.vocab_size)
        ]
    return record, small


def _check_chunks(where: Path, spec: StoredArray, tag: bytes, report: Report) -> Iterator[Array]:
    """Read every inner chunk (reading checks its crc32c); yields what could be read."""
    try:
        shard = Shard(where / shard_file(spec), spec, tag)
    except DamagedCacheError as error:
        report.findings.append(str(error))
        return
    for start in range(0, spec.shape[0], shard.rows):
        try:
            data = shard.read(start, min(start + shard.rows, spec.shape[0]))
        except DamagedCacheError as error:
            report.findings.append(str(error))
            continue
        report.checked_chunks += 1
        yield data


def _check_counts(record: PartRecord, small: dict[str, Array], vocab: int) -> Iterator[str]:
    start, last_start, mask, ids = (
        small[n] for n in ("sample_start", "sample_last_start", "loss_mask", "input_ids")
    )
    if start[0] != 0 or start[-1] != record.tokens or (np.diff(start) <= 0).any():
        yield "sample_start does not cut the part into samples"
        return
    if int(mask.sum()) != record.supervised_tokens:
        yield f"{int(mask.sum())} supervised tokens, the record says {record.supervised_tokens}"
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        yield f"token ids reach from {ids.min()} to {ids.max()}, the vocabulary has {vocab}"
    stored = np.cumsum(
        [0] + [int(last_rows(mask[a:b]).sum()) for a, b in itertools.pairwise(start)]
    )
    if not np.array_equal(stored, last_start):
        yield "sample_last_start does not follow from the loss mask"
    rows = small["sample_row"]
    if rows.size and (
        (np.diff(rows) < 0).any() or rows[0] < record.row_start or rows[-1] >= record.row_stop
    ):
        yield f"source rows are not in order within {record.row_start}-{record.row_stop}"


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
