"""The parts that a store has: found, counted, and complete or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dspark.cache.canonical import sealed
from dspark.cache.errors import DamagedCacheError, MismatchError
from dspark.cache.files.layout import PART_KEY, PARTS, part_name
from dspark.cache.files.metadata import group_metadata
from dspark.cache.files.place import Place, in_parallel, place_of
from dspark.cache.files.urls import Where
from dspark.cache.json_text import Json
from dspark.cache.manifest import Counts, Manifest
from dspark.cache.parts.record import PartRecord, read_record


def totals(records: Sequence[PartRecord]) -> Counts:
    """Return the total counts of all parts."""
    dropped: Counter[str] = Counter()
    for record in records:
        dropped.update(record.dropped)
    return Counts(
        parts=len(records),
        samples=sum(r.samples for r in records),
        tokens=sum(r.tokens for r in records),
        supervised_tokens=sum(r.supervised_tokens for r in records),
        last_rows=sum(r.last_rows for r in records),
        rows_read=sum(r.row_stop - r.row_start for r in records),
        truncated=sum(r.truncated for r in records),
        dropped=dict(sorted(dropped.items())),
    )


def by_source(records: Sequence[PartRecord], manifest: Manifest) -> list[Json]:
    """Return the counts of each source: ``{"number", "id", "parts", "rows", "samples", "tokens",
    "supervised_tokens", "dropped"}``.
    """
    out = []
    for number, source in enumerate(manifest.sources):
        found = totals([r for r in records if r.source == number])
        out.append(
            {
                "number": number,
                "id": source.id,
                "parts": found.parts,
                "rows": found.rows_read,
                "samples": found.samples,
                "tokens": found.tokens,
                "supervised_tokens": found.supervised_tokens,
                "dropped": found.dropped,
            }
        )
    return out


def check_whole(records: Sequence[PartRecord], manifest: Manifest, path: Where) -> None:
    """Raise MismatchError unless the parts are all blocks of every source, up to a last one that
    may be shorter.
    """
    rows = manifest.dump.block_rows
    for source in range(len(manifest.sources)):
        own = [r for r in records if r.source == source]
        for block, record in enumerate(own):
            last = block + 1 == len(own)
            if record.block != block or (record.row_stop != (block + 1) * rows and not last):
                raise MismatchError(
                    f"{path}: source {source} has no whole block {block} (rows "
                    f"{block * rows}-{(block + 1) * rows}), "
                    f"found part {part_name(record.index)} with rows "
                    f"{record.row_start}-{record.row_stop}"
                )


def scan_parts(path: str | Where) -> dict[int, PartRecord]:
    """Return the records of every committed part, by number."""
    place = place_of(path)
    names = place.list(PARTS)
    if place.remote:
        found = in_parallel(lambda name: _committed(place, name), [n for n in names if n.isdigit()])
        return {record.index: record for record in found if record is not None}
    root = place.where("")
    assert isinstance(root, Path)
    records = [read_record(place, name) for name in names if (root / PARTS / name).is_dir()]
    return {record.index: record for record in records}


def _committed(place: Place, name: str) -> PartRecord | None:
    """Return the record of a part in an object store; None if its writer has not written it yet."""
    try:
        return read_record(place, name)
    except DamagedCacheError as error:
        # Asking now whether it is there would tell of a later moment: others write beside us.
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def bytes_of(records: Iterable[PartRecord]) -> dict[str, int]:
    """Return the bytes on disk of each array over all parts, and of all metadata under the name
    ``""``.
    """
    out: Counter[str] = Counter()
    for record in records:
        for name, (size, *_) in record.files.items():
            array, _, file = name.partition("/")
            out[array if file.startswith("c/") else ""] += size
        out[""] += len(group_metadata(PART_KEY, sealed(record.to_json())))
    return dict(sorted(out.items()))
