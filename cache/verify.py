"""``dspark-tools verify``: every checksum and every count of a store. Reads everything once, decodes every chunk, names what is damaged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr

from dspark.cache.codec.fields import from_fields
from dspark.cache.errors import CacheError, DamagedCacheError
from dspark.cache.files.atomic import remove
from dspark.cache.files.index import build_index
from dspark.cache.files.layout import INDEX, PARTS, TARGET, PartLayout, StoredArray, part_name
from dspark.cache.files.part import Array, PartRecord, missing_files, read_record, shard_file, size_crc
from dspark.cache.files.shard import Shard
from dspark.cache.manifest import Manifest
from dspark.cache.reader import Cache, read_manifest
from dspark.cache.records import last_rows
from dspark.cache.target.files import damaged_files, what_to_do
from dspark.cache.writer import StoreWriter


@dataclass(slots=True)
class Report:
    """``findings``: one sentence each, empty = sound. ``damaged``: what must be written again, parts by name and files as ``target/NAME``."""

    checked_chunks: int = 0
    checked_parts: int = 0
    findings: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        return not self.findings


def verify(path: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Check the store at ``path``. ``progress(done, total)`` is called once per part. Raises only if it is not a store at all."""
    path = Path(path)
    manifest = read_manifest(path)
    report = Report()
    folders = sorted(p for p in (path / PARTS).glob("[0-9]*") if p.is_dir())
    expected = manifest.counts.parts if manifest.complete else len(folders)
    for i in range(max(expected, len(folders))):
        if not (path / PARTS / part_name(i)).is_dir():
            report.findings.append(f"{path / PARTS / part_name(i)}: the part is missing")
            report.damaged.add(part_name(i))
    small: list[dict[str, Array]] = []
    records: list[PartRecord] = []
    for done, folder in enumerate(folders):
        before = len(report.findings)
        checked = _check_part(folder, manifest, report)
        if checked is not None:
            records.append(checked[0])
            small.append(checked[1])
        if len(report.findings) > before:
            report.damaged.add(folder.name)
        report.checked_parts += 1
        progress(done + 1, len(folders))
    if not report.findings:
        report.findings += _check_totals(path, manifest, records, small)
    for name, finding in damaged_files(path / TARGET, manifest).items():
        report.findings.append(f"{finding}. {what_to_do(path)}")
        report.damaged.add(f"{TARGET}/{name}")
    return report


def _check_part(
    folder: Path, manifest: Manifest, report: Report
) -> tuple[PartRecord, dict[str, Array]] | None:
    """Check one part; what is wrong goes into ``report``. Returns its record and its small arrays if they could be read."""
    try:
        record = read_record(folder)
    except CacheError as error:
        report.findings.append(str(error))
        return None
    absent = list(missing_files(folder, record))
    report.findings += absent
    for name, (size, *sums) in record.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            continue  # said above
        found = size_crc(file)[1:]
        if found[: len(sums)] != tuple(sums):
            report.findings.append(f"{file}: the file's checksums are {list(found)}, the record says {sums}")
    for extra in sorted(
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        - set(record.files)
        - {"zarr.json"}
    ):
        report.findings.append(f"{folder / extra}: a file that the part's record does not list")
    if absent:
        return None
    codec = from_fields(manifest.aux, manifest.last, str(folder))
    layout = PartLayout(codec, len(manifest.layers), manifest.target.hidden_size)
    specs = layout.arrays(record.tokens, record.samples, record.last_rows)
    small: dict[str, Array] = {}
    for spec in specs:
        try:
            array = zarr.open_array(folder / spec.name, mode="r")
            if (array.shape, array.dtype) != (spec.shape, np.dtype(spec.dtype)):
                raise DamagedCacheError(
                    f"is {array.dtype}{array.shape}, the counts say {spec.dtype}{spec.shape}"
                )
        except Exception as error:
            report.findings.append(f"{folder / spec.name}: {error}")
            continue
        pieces = list(_check_chunks(folder / spec.name, spec, report)) if spec.shape[0] else []
        if spec.name not in layout.specs and pieces:
            small[spec.name] = np.concatenate(pieces)
    if len(small) == 6:
        report.findings += [
            f"{folder}: {text}" for text in _check_counts(record, small, manifest.target.vocab_size)
        ]
    return record, small


def _check_chunks(where: Path, spec: StoredArray, report: Report) -> Iterator[Array]:
    """Read every inner chunk (the read checks its crc32c); yields what could be read."""
    shard = Shard(where / shard_file(spec), spec)
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
    if ids.min() < 0 or ids.max() >= vocab:
        yield f"token ids reach from {ids.min()} to {ids.max()}, the vocabulary has {vocab}"
    stored = np.cumsum([0] + [int(last_rows(mask[a:b]).sum()) for a, b in itertools.pairwise(start)])
    if not np.array_equal(stored, last_start):
        yield "sample_last_start does not follow from the loss mask"
    rows = small["sample_row"]
    if (np.diff(rows) < 0).any() or rows[0] < record.row_start or rows[-1] >= record.row_stop:
        yield f"source rows are not in order within {record.row_start}-{record.row_stop}"


def _check_totals(
    path: Path, manifest: Manifest, records: list[PartRecord], small: list[dict[str, Array]]
) -> Iterator[str]:
    for a, b in itertools.pairwise(records):
        if a.row_stop != b.row_start:
            yield f"{path}: part {a.index} ends at source row {a.row_stop}, part {b.index} begins at {b.row_start}"
    if not manifest.complete:
        return
    counts = manifest.counts
    for name in ("samples", "tokens", "supervised_tokens", "last_rows"):
        if (found := sum(getattr(r, name) for r in records)) != getattr(counts, name):
            yield f"{path}: the parts hold {found} {name}, the manifest says {getattr(counts, name)}"
    cache = Cache(path, manifest)
    try:
        index = cache.index
        for i in range(cache.parts):
            cache.record(i)
    except CacheError as error:
        yield str(error)
        return
    for name, data in build_index(small).items():
        if not np.array_equal(index[name], data):
            yield f"{path / INDEX / name}: differs from what the parts hold"


def drop_damaged(path: str | Path, report: Report) -> list[str]:
    """Delete what is damaged and mark the store incomplete; ``dspark-dump --resume`` then writes exactly that again. Returns its names."""
    path = Path(path)
    for name in sorted(report.damaged):
        remove(path / name if name.startswith(f"{TARGET}/") else path / PARTS / name)
    if report.findings:
        StoreWriter(path, read_manifest(path), {}).reopen()
    return sorted(report.damaged)
