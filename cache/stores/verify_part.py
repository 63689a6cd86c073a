"""Verify one part: its record, its files, every chunk, and what its arrays hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dspark.cache.errors import (
    CacheError,
    DamagedCacheError,
    MismatchError,
    UnreadableError,
    read_error,
)
from dspark.cache.files.checksum import file_sums
from dspark.cache.files.layout import PARTS, PartLayout, StoredArray
from dspark.cache.files.metadata import read_shape
from dspark.cache.files.place import Folder, Place
from dspark.cache.manifest import Manifest
from dspark.cache.parts.arrays import tokens_sha256
from dspark.cache.parts.index import PART_ARRAYS, TURN
from dspark.cache.parts.part import missing_files, part_specs, shard_file
from dspark.cache.parts.record import PartRecord, read_record
from dspark.cache.parts.shard import Shard
from dspark.cache.records import Array, last_rows


@dataclass(slots=True)
class Report:
    """What was found in a store, or in one part. ``findings``: one sentence each; empty = sound.
    ``damaged``: what must be rewritten: parts by name, and files as ``target/NAME``.
    ``unreadable``: what could not be read now (an I/O error, no permission, too few file handles)
    and may be intact. ``stray``: of ``damaged``, parts that the store is whole without.
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


class ForeignPart(MismatchError):
    """A part that belongs to another plan than the store's."""


@dataclass(slots=True)
class Checked:
    """What was found in one part: its record and small arrays, if they could be read."""

    report: Report = field(default_factory=Report)
    record: PartRecord | None = None
    small: dict[str, Array] = field(default_factory=dict)
    foreign: bool = False


def check_part(
    place: Place, name: str, manifest: Manifest, digest: str, layout: PartLayout
) -> Checked:
    """Check one part; for a remote store, a copy made for the check."""
    out = Checked()
    where = place.where(f"{PARTS}/{name}")
    try:
        with place.local(f"{PARTS}/{name}") as folder:
            try:
                checked = _check_arrays(folder, manifest, digest, layout, out.report)
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


def _check_arrays(
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
