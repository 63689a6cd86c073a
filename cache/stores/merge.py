"""Combine stores with the same plan: ``merge`` joins what several writers made, ``append`` adds a
second corpus.

Parts are blocks of source rows and depend on nothing else, so a part is taken over unchanged: its
files get a second name (a hard link, or a copy if links are impossible). If a part's source gets
another number, so does the part; since its shards' tags contain the number, its files are copied
with new tags. The given stores are not changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.cache.canonical import sealed
from dspark.cache.errors import (
    DamagedCacheError,
    ExistsError,
    MismatchError,
    StoreWriteError,
    UsageError,
)
from dspark.cache.files.atomic import staged
from dspark.cache.files.calibration import stored_codec
from dspark.cache.files.checksum import crc32, crc32c
from dspark.cache.files.layout import (
    CALIBRATION,
    PART_KEY,
    PARTS,
    SOURCE_STRIDE,
    TARGET,
    PartLayout,
    part_name,
    part_number,
)
from dspark.cache.files.lock_files import owned
from dspark.cache.files.metadata import write_attributes
from dspark.cache.files.place import (
    Folder,
    Object,
    Place,
    each_in_parallel,
    place_of,
    refuse_links,
)
from dspark.cache.files.urls import Where, where
from dspark.cache.manifest import Manifest, SourceInfo, differences
from dspark.cache.parts.blocks import missing_rows, rows_known, spans
from dspark.cache.parts.committed import check_whole, scan_parts, totals
from dspark.cache.parts.index import write_index
from dspark.cache.parts.part import missing_files
from dspark.cache.parts.record import PartRecord
from dspark.cache.stored_manifest import read_manifest, write_manifest
from dspark.cache.target.files import what_to_do
from dspark.cache.writer import StoreWriter

if TYPE_CHECKING:
    from dspark.cache.codec.base import Codec

Progress = Callable[[int, int], None]
STEP = 256  # parts between two reports of progress
COPY = 8 << 20  # bytes of a file that are copied at once


@dataclass(frozen=True, slots=True)
class Given:
    """A store to be joined with others: its parts by number, and the number of each of its sources
    in the result.
    """

    path: Where
    place: Place
    manifest: Manifest
    records: Mapping[int, PartRecord]
    sources: Mapping[int, int]


def merge(
    out: str | Where,
    stores: Sequence[str | Where],
    *,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Join ``stores`` into the new store ``out``; returns its manifest.

    Raises ExistsError if ``out`` exists, and MismatchError if plans differ, if two stores hold
    different parts of the same rows, or if rows are missing (naming them).
    """
    out = where(out)
    if not stores:
        raise UsageError("merge: give the stores to join after the new one")
    refuse_existing(out)
    sources: list[SourceInfo] = []
    given = [_given(where(s), sources) for s in stores]
    first = given[0].manifest
    for other in given[1:]:
        _same_plan(first, given[0].path, other.manifest, other.path)
    chosen = _chosen(given)
    _refuse_missing(given, chosen, sources, out)
    _refuse_damaged(chosen.values())
    codec = stored_codec(given[0].place, first)
    complete = [g.manifest for g in given if g.manifest.quality]
    manifest = dataclasses.replace(
        first,
        sources=[dataclasses.replace(s, rows=None) for s in sources],
        quality=complete[0].quality if complete else {},
    )
    with new_place(out, "dspark-tools merge") as place:
        each = each_in_parallel(place, *(g.place for g in given))
        each(
            lambda name: place.link(given[0].place, name, name),
            list(common_objects(given[0].place)),
        )
        records = []

        def take(one: tuple[int, tuple[Given, PartRecord]]) -> PartRecord:
            number, (store, record) = one
            return _take(place, "", store, record, number)

        todo = sorted(chosen.items())
        for start in range(0, len(todo), STEP):
            records += each(take, todo[start : start + STEP])
            progress(len(records), len(todo))
        return _ended(place, manifest, records, codec)


def refuse_existing(out: Where) -> None:
    """Raise ExistsError if there is anything at ``out``, where a new store is to be made."""
    place = place_of(out)
    if not place.exists():
        return
    if place.remote and not place.exists("zarr.json"):
        raise ExistsError(
            f"{out}: there are objects, but no zarr.json: what a command left that was killed, or "
            "a store without its manifest. Delete them with the service's own tools (dspark-tools "
            "verify --rebuild-index makes a lost manifest again), or give the new store another "
            "name."
        )
    raise ExistsError(f"{out} exists. Give the new store another name.")


@contextmanager
def new_place(out: Where, who: str) -> Iterator[Place]:
    """Yield the place where ``who`` assembles the store ``out``, whose lock it holds. A local one
    gets its name only when the block ends; at a URL, an error deletes what was written.
    """
    with owned(out, who):
        if isinstance(out, Path):
            with staged(out) as new:
                new.mkdir()
                yield Folder(new)
            return
        refuse_existing(out)  # now that no other command makes it
        place = place_of(out)
        try:
            yield place
        except BaseException:
            with suppress(OSError, StoreWriteError):
                place.remove("")
            raise


def append(
    store: str | Where,
    others: Sequence[str | Where],
    *,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Add the sources of ``others``, complete stores with the plan of ``store``, to it; returns its
    manifest. An interrupted call can simply be repeated; what it left is deleted by one with other
    stores. Raises MismatchError if plans differ, if a
    store is not complete, or if a source is already there.
    """
    store = where(store)
    manifest = read_manifest(store)
    sources = [dataclasses.replace(s, rows=None) for s in manifest.sources]
    own = len(sources)
    given = [_given(where(s), sources) for s in others]
    for one in [(store, manifest), *((g.path, g.manifest) for g in given)]:
        if not one[1].complete:
            raise MismatchError(
                f"{one[0]}: the store is not complete. Finish its dump with --resume, then append."
            )
    for g in given:
        _same_plan(manifest, store, g.manifest, g.path)
        if twice := [sources[n].id for n in g.sources.values() if n < own]:
            raise MismatchError(f"{g.path}: its source {twice[0]} is already in {store}")
    chosen = _chosen(given)
    _refuse_damaged(chosen.values())
    codec = stored_codec(place_of(store), manifest)
    with owned(store, "dspark-tools append"), StoreWriter(store, manifest, {})._joined() as writer:
        there = scan_parts(store)
        records = [r for n, r in there.items() if n // SOURCE_STRIDE < own]
        left = {n: r for n, r in there.items() if n // SOURCE_STRIDE >= own}
        for number, stray in left.items():  # by a call that was stopped
            if number not in chosen or not _is_of(stray, chosen[number][1]):
                writer.place.remove(f"{PARTS}/{part_name(number)}")
        for done, (number, (other, record)) in enumerate(sorted(chosen.items())):
            if number in left and _is_of(left[number], record):
                records.append(left[number])
            else:
                records.append(_take(writer.place, writer.token, other, record, number))
            progress(done + 1, len(chosen))
        manifest = dataclasses.replace(manifest, sources=sources)
        return _ended(writer.place, manifest, records, codec)


def _is_of(taken: PartRecord, record: PartRecord) -> bool:
    """Tell whether ``taken``, a part under another number, is the one that ``record`` describes."""
    renamed = dataclasses.replace(record, index=taken.index, source=taken.source, files=taken.files)
    return taken == renamed


def _given(path: Where, sources: list[SourceInfo]) -> Given:
    """Open the store at ``path``; its sources that are not yet in ``sources`` are added there."""
    manifest = read_manifest(path)
    if manifest.format_version == 1:
        raise UsageError(
            f"{path}: stores of format version 1 cannot be joined. Convert it first: "
            f"dspark-tools recode {path} NEW"
        )
    if isinstance(path, Path):
        refuse_links(path)
    numbers = {}
    for own, source in enumerate(manifest.sources):
        same = [
            i
            for i, s in enumerate(sources)
            if (s.id, s.sha256, s.limit) == (source.id, source.sha256, source.limit)
        ]
        if same and sources[same[0]].rows is None:
            sources[same[0]] = source
        if not same:
            sources.append(source)
        numbers[own] = same[0] if same else len(sources) - 1
    records = scan_parts(path)
    for record in records.values():
        if record.plan_sha256 != manifest.digest():
            raise MismatchError(
                f"{path / PARTS / part_name(record.index)}: this part belongs to another plan "
                f"than the store's. See dspark-tools verify {path}"
            )
    return Given(path, place_of(path), manifest, records, numbers)


def _same_plan(a: Manifest, store: Where, b: Manifest, other: Where) -> None:
    if a.digest() == b.digest():
        return
    found = "\n  ".join(
        f"{name}: {x!r:.80} and {y!r:.80}" for name, x, y in differences(a.plan(), b.plan())[:8]
    )
    raise MismatchError(
        f"{store} and {other} have different plans, so their samples are not comparable.\n  "
        f"{found}\nDump both with the same flags, and with the same --calibration if the "
        "codec needs one. Rows per part (run.block_rows) follow from --part-tokens and the corpus; "
        "a dump with --calibration STORE and without --part-tokens takes those of STORE."
    )


def _chosen(given: Sequence[Given]) -> dict[int, tuple[Given, PartRecord]]:
    """Return the parts of the result by number, each with the first store that has it. Raises
    MismatchError if two differ.
    """
    out: dict[int, tuple[Given, PartRecord]] = {}
    for store in given:
        for record in store.records.values():
            number = part_number(store.sources[record.source], record.block)
            if number not in out:
                out[number] = store, record
                continue
            other, first = out[number]
            # shards of a part under another number have other tags, thus other checksums
            moved = first.index != record.index
            if first.rows_sha256 != record.rows_sha256 or (
                first.files != record.files and not moved
            ):
                raise MismatchError(
                    f"{other.path} and {store.path} have different parts of rows "
                    f"{record.row_start:,}-{record.row_stop - 1:,} "
                    f"of {record.source_id}. Delete one of them: "
                    f"{store.path / PARTS / part_name(record.index)}"
                )
    return out


def _refuse_missing(
    given: Sequence[Given],
    chosen: Mapping[int, tuple[Given, PartRecord]],
    sources: Sequence[SourceInfo],
    out: Where,
) -> None:
    rows: dict[int, int] = {}
    size = given[0].manifest.dump.block_rows
    for store in given:
        known = rows_known(store.records.values(), size, store.manifest.sources)
        if store.manifest.complete:
            ends = {r.source: r.row_stop for r in store.records.values()}
            known = {s: max(known.get(s, 0), stop) for s, stop in ends.items()}
        rows.update({store.sources[s]: n for s, n in known.items()})
    if missing := missing_rows(chosen, rows, size):
        raise MismatchError(
            f"{out}: not written: {spans(missing)} are missing. Run the shards that make them "
            "(dspark-dump --shard), then merge again. Sources: "
            f"{', '.join(f'{i} = {s.id}' for i, s in enumerate(sources))}"
        )
    if unknown := [s.id for i, s in enumerate(sources) if i not in rows]:
        raise MismatchError(
            f"{out}: not written: no store says how many rows {unknown[0]} has, because none of "
            "its dumps has ended. Finish one of them with --resume."
        )


def _refuse_damaged(parts: Collection[tuple[Given, PartRecord]]) -> None:
    """Raise DamagedCacheError if a part that is to be taken lacks a file, or has one of another
    size.
    """

    def finding(part: tuple[Given, PartRecord]) -> str | None:
        return next(missing_files(part[0].place, part[1]), None)

    chosen = list(parts)
    run = each_in_parallel(*(store.place for store, _ in chosen))
    for (store, _), found in zip(chosen, run(finding, chosen), strict=True):
        if found:
            raise DamagedCacheError(f"{found}. Nothing was changed. {what_to_do(store.path)}")


def common_objects(place: Place) -> Iterator[str]:
    """Return the names of a store's objects that belong to no part, except manifest and index."""
    yield from (f"{TARGET}/{name}" for name in place.list(TARGET))
    yield f"{PARTS}/zarr.json"
    if CALIBRATION in place.list(""):
        yield CALIBRATION


def _take(place: Place, token: str, store: Given, record: PartRecord, number: int) -> PartRecord:
    """Take part ``record`` of ``store`` as part ``number`` at ``place``; returns its record
    there.
    """
    name, old = f"{PARTS}/{part_name(number)}", f"{PARTS}/{part_name(record.index)}"
    if number == record.index:
        for file in (*record.files, "zarr.json"):
            place.link(store.place, f"{old}/{file}", f"{name}/{file}")
        return record
    files = {}
    moved = dataclasses.replace(record, index=number, source=number // SOURCE_STRIDE)
    with place.commit(name, token) as folder:
        for file in record.files:
            array, _, chunk = file.partition("/")
            to = folder / file
            to.parent.mkdir(parents=True, exist_ok=True)
            tag = moved.tag(array) if chunk.startswith("c/") else b""
            files[file] = list(_copy(store.place.open(f"{old}/{file}"), to, tag))
        moved = dataclasses.replace(moved, files=files)
        write_attributes(folder, PART_KEY, sealed(moved.to_json()))
    return moved


def _copy(source: Object, to: Path, tag: bytes) -> tuple[int, int, int]:
    """Copy ``source`` to the new file ``to`` with its first bytes replaced by ``tag``; returns
    size, crc32c and crc32.
    """
    size, crc, other = source.size, 0, 0
    with open(to, "wb") as file:
        for start in range(0, size, COPY):
            data = source.read(start, COPY).tobytes()
            if not start:
                data = tag + data[len(tag) :]
            file.write(data)
            crc, other = crc32c(data, crc), crc32(data, other)
    return size, crc, other


def _ended(
    place: Place, manifest: Manifest, records: Sequence[PartRecord], codec: Codec
) -> Manifest:
    """Write index and manifest of the store at ``place``, which holds the parts in ``records``."""
    check_whole(records, manifest, place.where(""))
    layout = PartLayout(codec, len(manifest.layers), manifest.target.hidden_size)
    write_index(place, records, layout)
    manifest = dataclasses.replace(manifest, counts=totals(records), complete=True)
    write_manifest(place, manifest)
    return manifest
