"""Write a store: create or resume, commit parts in any order, finish. Append-only; a committed part
is never touched again.

If the process dies, the store has the committed parts and nothing else that a reader would mistake
for data. ``resume`` refuses a run that would not write the same store (another target, layers,
codec, rules), naming every difference. Several writers may work on one store at once: a part's
bytes do not depend on who writes it, and if two writers make the same part, the second finds it
there.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import zarr

from dspark.cache.canonical import sealed
from dspark.cache.codec.base import Codec
from dspark.cache.errors import (
    DamagedCacheError,
    ExistsError,
    MismatchError,
    NotACacheError,
    UsageError,
)
from dspark.cache.files.atomic import (
    STAGING,
    clear_staging,
    fsync_path,
    fsync_tree,
    remove,
    staged,
    write_errors,
)
from dspark.cache.files.calibration import codec_info, save_calibration, stored_codec
from dspark.cache.files.layout import (
    INDEX,
    INDEX_KEY,
    PART_KEY,
    PARTS,
    ROOT_KEY,
    SOURCE_STRIDE,
    TARGET,
    TARGET_WEIGHTS,
    PartLayout,
    part_name,
)
from dspark.cache.files.metadata import group_metadata, write_attributes
from dspark.cache.files.place import Place, in_parallel, place_of
from dspark.cache.files.urls import Where
from dspark.cache.json_text import Json
from dspark.cache.manifest import Counts, Manifest, SourceInfo, from_plan
from dspark.cache.parts.arrays import assemble, join_tokens
from dspark.cache.parts.blocks import missing_rows
from dspark.cache.parts.index import (
    PART_ARRAYS,
    TURN,
    build_index,
    index_specs,
    index_sums,
    read_index_record,
)
from dspark.cache.parts.part import PartJob, missing_files, open_shard, write_array
from dspark.cache.parts.record import Block, PartRecord, read_record
from dspark.cache.reader import read_manifest
from dspark.cache.records import Array, CodedSample, TokenSample
from dspark.cache.target.files import damaged_files, write_target
from dspark.cache.target.frozen import FrozenTarget

SAME_TARGET = (
    "Use the target revision and the dtype that the store was started with, or --overwrite."
)


def refuse_to_replace(place: Place, *, overwrite: bool) -> None:
    """Raise ExistsError if there is anything at ``place``, unless it is a store and to be
    overwritten.
    """
    if not place.exists():
        return
    path = place.where("")
    if not overwrite:
        raise ExistsError(
            f"{path} exists. Use --resume to continue it, --overwrite to replace it, or another "
            "--output."
        )
    # At a URL, a killed --overwrite leaves an old store without its manifest.
    mine = place.exists(f"{PARTS}/zarr.json") and (place.remote or place.exists("zarr.json"))
    if not mine:
        raise ExistsError(
            f"{path} exists and is not a dspark store, so it is not overwritten. Choose another "
            "--output."
        )


class StoreWriter:
    """One of the writers of a store. ``committed``: part number -> record, for the parts that were
    on disk at the start and those that it wrote. ``guard`` is called before anything is written,
    and raises if the caller may no longer write (its lock was broken).
    """

    def __init__(
        self, path: str | Where, manifest: Manifest, committed: dict[int, PartRecord]
    ) -> None:
        self._lock = -1
        self.guard: Callable[[], None] = lambda: None
        self.place = place_of(path)
        self.path = self.place.where("")
        self.manifest = manifest
        self.committed = committed
        self.codec: Codec = stored_codec(self.place, manifest)
        self.layout = PartLayout(self.codec, len(manifest.layers), manifest.target.hidden_size)
        self._plan, self._digest = manifest.plan(), manifest.digest()
        self.token = f".{secrets.token_hex(4)}"

    @classmethod
    def create(
        cls,
        path: str | Where,
        manifest: Manifest,
        target: FrozenTarget,
        files: Mapping[str, bytes],
        *,
        codec: Codec | None = None,
        overwrite: bool = False,
        weights_sha256: str | None = None,
    ) -> StoreWriter:
        """Create a new store. ``files``: small files kept under ``target/`` (tokenizer, chat
        template). ``codec``: the calibrated codec, if the manifest's needs calibration.
        ``weights_sha256``: of the target that a supplied calibration was made for. Raises
        ExistsError if ``path`` exists, unless ``overwrite``, and MismatchError for another target's
        weights. An old store stays until the new one replaces it.
        """
        place = place_of(path)
        path = place.where("")
        refuse_to_replace(place, overwrite=overwrite)
        with new_store(place, overwrite) as new:
            sha = write_target(new / TARGET, target, manifest.target.config, files)
            if weights_sha256 not in (None, sha):
                raise MismatchError(
                    f"{path}: this run's target is not the one that the calibration was made "
                    f"for: sha256 of its embedding, final norm and head is {sha}, the "
                    f"calibration has {weights_sha256}. {SAME_TARGET}"
                )
            manifest = dataclasses.replace(
                manifest, target=dataclasses.replace(manifest.target, weights_sha256=sha)
            )
            if codec is not None:
                manifest = dataclasses.replace(manifest, codec=codec_info(codec))
                learnt = save_calibration(codec, new, manifest)
                info = dataclasses.replace(manifest.codec, calibration_sha256=learnt)
                manifest = dataclasses.replace(manifest, codec=info)
            zarr.create_group(new / PARTS, zarr_format=3)
            write_attributes(new, ROOT_KEY, sealed(manifest.to_json()))
        return cls(path, manifest, {})._joined()

    @classmethod
    def resume(cls, path: str | Where, manifest: Manifest) -> StoreWriter:
        """Continue the store at ``path``. Raises MismatchError unless ``manifest`` plans the same
        store.

        A committed part whose files are missing or cut short raises DamagedCacheError:
        ``dspark-tools verify --drop-damaged`` removes such parts, and the next ``--resume``
        rewrites them. ``restore_target`` does the same for ``target/``, once the weights are read.
        """
        found = read_manifest(path)
        found.same_plan(manifest, str(path))
        writer = cls(path, found, {})._joined()
        path = writer.path
        writer.committed = scan_parts(path)
        for index, record in writer.committed.items():
            if record.plan_sha256 != writer._digest:
                raise MismatchError(
                    f"{path / PARTS / part_name(index)}: this part belongs to another "
                    "plan than the store's"
                )
            for finding in missing_files(writer.place, record):
                raise DamagedCacheError(
                    f"{finding}. Run: dspark-tools verify --drop-damaged {path}"
                )
        return writer

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def _joined(self) -> StoreWriter:
        """Hold the writers' lock together with the others; the first one deletes what an
        interrupted writer left. In an object store nothing is left half-written.
        """
        if not isinstance(self.path, Path):
            return self
        with write_errors(self.path):
            # a folder can be locked like a file
            self._lock = os.open(self.path / PARTS, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                for folder in (self.path, self.path / PARTS):
                    clear_staging(folder)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        return self

    def restore_target(self, target: FrozenTarget, files: Mapping[str, bytes]) -> list[str]:
        """Rewrite missing or damaged files of ``target/``, atomically one by one; returns their
        names. Raises MismatchError, changing nothing, if ``target`` and ``files`` do not match the
        manifest's hashes: new parts would hold states of another model than the existing ones.
        Hashes the weights in the store and ``target`` once each; writes only if something is wrong.
        """
        if not isinstance(self.path, Path):
            return self._restore_remote(target, files)
        folder, staged = self.path / TARGET, self.path / (STAGING + TARGET)
        wrong = sorted(
            {
                *damaged_files(folder, self.manifest),
                *(n for n in files if not (folder / n).is_file()),
            }
        )
        if not wrong:
            expected, found = (
                self.manifest.target.weights_sha256,
                target.sha256_in(folder / TARGET_WEIGHTS),
            )
            if found != expected:
                raise MismatchError(
                    f"{self.path}: this run's target is not the one that the store was started "
                    f"with: sha256 of its embedding, final norm and head is {found}, "
                    f"the manifest says {expected}. {SAME_TARGET}"
                )
            return []
        with write_errors(folder):
            remove(staged)
            write_target(staged, target, self.manifest.target.config, files)
            try:
                self._refuse_other(staged, wrong)
            except MismatchError:
                shutil.rmtree(staged)
                raise
            fsync_tree(staged)
            folder.mkdir(exist_ok=True)
            for name in wrong:
                os.replace(staged / name, folder / name)
            fsync_path(folder)
            shutil.rmtree(staged)
        return wrong

    def _restore_remote(self, target: FrozenTarget, files: Mapping[str, bytes]) -> list[str]:
        """As ``restore_target``, for an object store: this run's files are made locally and
        compared, and the missing or different ones are written.
        """
        with (
            tempfile.TemporaryDirectory(prefix="dspark-target-") as made,
            self.place.local(TARGET) as there,
        ):
            mine = Path(made) / TARGET
            write_target(mine, target, self.manifest.target.config, files)
            wrong = sorted(
                {
                    *damaged_files(there, self.manifest),
                    *(n for n in files if not (there / n).is_file()),
                }
            )
            self._refuse_other(mine, wrong)
            for name in wrong:
                self.place.write(f"{TARGET}/{name}", (mine / name).read_bytes())
        return wrong

    def _refuse_other(self, mine: Path, wrong: Sequence[str]) -> None:
        """Raise MismatchError unless the files of the target in ``mine`` are those of the store."""
        if other := damaged_files(mine, self.manifest):
            what = f"{', '.join(wrong)} must be written again, but " if wrong else ""
            raise MismatchError(
                f"{self.path / TARGET}: {what}this run's target is not the one that the store "
                "was started with.\n  "
                + "\n  ".join(text.replace(str(mine), "this run") for text in other.values())
                + f"\n{SAME_TARGET}"
            )

    def commit(self, index: int, samples: Sequence[CodedSample], block: Block) -> PartRecord:
        """Write part ``index`` of ``block`` durably; if it raises, the part does not exist.

        Synchronous. Different parts may be committed from different threads at once.
        """
        arrays, states = assemble(samples, self.layout)
        return self.add(self._job(index, arrays, block).write(states))

    def block(
        self,
        index: int,
        row_start: int,
        row_stop: int,
        *,
        dropped: Mapping[str, int],
        truncated: int,
        rows_sha256: str | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> Block:
        """Return the block of part ``index``."""
        source = index // SOURCE_STRIDE
        return Block(
            row_start=row_start,
            row_stop=row_stop,
            dropped=dict(sorted(dropped.items())),
            truncated=truncated,
            source=source,
            source_id=self.manifest.sources[source].id,
            rows_sha256=rows_sha256,
            versions=dict(versions or {}),
        )

    def job(self, index: int, tokens: Sequence[TokenSample], block: Block) -> PartJob:
        """Prepare part ``index`` to be written wherever its states are; its record must then be
        passed to ``add``.
        """
        return self._job(index, join_tokens(tokens)[0], block)

    def add(self, record: PartRecord) -> PartRecord:
        """Count a part that a ``PartJob`` has written."""
        self.committed[record.index] = record
        return record

    def _job(self, index: int, arrays: dict[str, Array], block: Block) -> PartJob:
        self.guard()
        assert index not in self.committed
        assert block.source == index // SOURCE_STRIDE
        rows = self.manifest.dump.block_rows
        first = index % SOURCE_STRIDE * rows
        if block.row_start != first or not first < block.row_stop <= first + rows:
            raise MismatchError(
                f"{self.path}: part {index} would cover source rows "
                f"{block.row_start}-{block.row_stop}, expected at most {rows} rows, "
                f"starting at {first}"
            )
        tokens, stored = arrays["input_ids"].shape[0], int(arrays["sample_last_start"][-1])
        samples = arrays["sample_row"].shape[0]
        return PartJob(
            place=self.place,
            index=index,
            arrays=arrays,
            specs=self.layout.small(tokens, samples, 0) + self.layout.states(tokens, stored),
            exact=self.layout.exact,
            block=block,
            plan=self._plan,
            plan_sha256=self._digest,
            token=self.token,
        )

    def finish(self, *, quality: Json | None = None) -> Manifest:
        """Write the sample index and mark the store complete."""
        self.guard()
        self.committed = scan_parts(self.path)  # of all writers
        records = [self.committed[i] for i in sorted(self.committed)]
        check_whole(records, self.manifest, self.path)
        write_index(self.place, records, self.layout)
        self.manifest = dataclasses.replace(
            self.manifest, counts=totals(records), complete=True, quality=quality or {}
        )
        self._write_manifest()
        return self.manifest

    def append(self, sources: Sequence[SourceInfo]) -> None:
        """Add sources to the store, which is incomplete until their parts exist. Existing sources
        keep their numbers and digests.
        """
        known = self.manifest.sources
        if len(sources) > len(known):
            more = [*known, *sources[len(known) :]]
            self.manifest = dataclasses.replace(
                self.manifest, sources=more, counts=Counts(), complete=False
            )
            self._write_manifest()

    def finish_shard(
        self, rows: Mapping[int, int], *, quality: Json, sources: Sequence[SourceInfo]
    ) -> Manifest:
        """End one of several dumps: finish the store if no part is missing, else note how many
        ``rows`` each source has. Returns the resulting manifest. The caller holds the store's lock,
        so that no two finish at once.
        """
        self.guard()
        found = read_manifest(self.path)
        if found.complete:  # another writer finished last
            self.manifest = found
            return found
        self.committed = scan_parts(self.path)
        if not missing_rows(self.committed, rows, self.manifest.dump.block_rows):
            self.manifest = dataclasses.replace(self.manifest, sources=list(sources))
            return self.finish(quality=quality)
        known = [dataclasses.replace(s, rows=rows.get(i)) for i, s in enumerate(sources)]
        self.manifest = dataclasses.replace(self.manifest, sources=known, quality=quality)
        self._write_manifest()
        return self.manifest

    def reopen(self) -> None:
        """Mark the store incomplete again (a damaged part was removed and will be rewritten)."""
        self.manifest = dataclasses.replace(self.manifest, complete=False)
        self._write_manifest()

    def _write_manifest(self) -> None:
        self.place.write("zarr.json", group_metadata(ROOT_KEY, sealed(self.manifest.to_json())))

    def close(self) -> None:
        """Leave the group of writers."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


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


@contextmanager
def new_store(place: Place, overwrite: bool) -> Iterator[Path]:
    """Yield a local folder that becomes the store at ``place`` when the block ends; its manifest is
    written last.
    """
    path = place.where("")
    if isinstance(path, Path):
        with staged(path, replace=overwrite) as new:
            yield new
        return
    from dspark.cache.files.bucket import Bucket

    assert isinstance(place, Bucket)
    with tempfile.TemporaryDirectory(prefix="dspark-store-") as made:
        new = Path(made) / "store"
        yield new
        if overwrite:
            place.remove("")
        place.upload(new, "", new=True)


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


def write_index(place: Place, records: Sequence[PartRecord], layout: PartLayout) -> None:
    """Write ``index/``, so that opening a large store reads a few files and not a folder per
    part.
    """

    def arrays(record: PartRecord) -> dict[str, Array]:
        specs = layout.small(record.tokens, record.samples, record.exact[0])
        return {
            s.name: open_shard(place, record, s).read(0, s.shape[0])
            if s.shape[0]
            else np.empty(s.shape, s.dtype)
            for s in specs
            if s.name in (*PART_ARRAYS, TURN)
        }

    if place.remote:
        parts: Iterable[dict[str, Array]] = in_parallel(arrays, list(records))
    else:
        parts = (arrays(record) for record in records)
    index = build_index(parts, [r.index for r in records])
    with place.replace(INDEX) as new:
        zarr.create_group(new, zarr_format=3)
        for spec in index_specs(index):
            write_array(new, spec, index[spec.name])
        body = {
            "part_crc32c": [sealed(r.to_json())["crc32c"] for r in records],
            "array_crc32c": index_sums(index),
            "bytes": bytes_of(records),
        }
        write_attributes(new, INDEX_KEY, sealed(body))


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
    place.write("zarr.json", group_metadata(ROOT_KEY, sealed(manifest.to_json())))
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
