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
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import zarr

from dspark.cache.canonical import sealed
from dspark.cache.codec.base import Codec
from dspark.cache.errors import (
    DamagedCacheError,
    ExistsError,
    MismatchError,
)
from dspark.cache.files.atomic import (
    clear_staging,
    staged,
    write_errors,
)
from dspark.cache.files.calibration import codec_info, save_calibration, stored_codec
from dspark.cache.files.layout import (
    PARTS,
    ROOT_KEY,
    SOURCE_STRIDE,
    TARGET,
    PartLayout,
    part_name,
)
from dspark.cache.files.metadata import write_attributes
from dspark.cache.files.place import Place, place_of
from dspark.cache.files.urls import Where
from dspark.cache.json_text import Json
from dspark.cache.manifest import Counts, Manifest, SourceInfo
from dspark.cache.parts.arrays import assemble, join_tokens
from dspark.cache.parts.blocks import missing_rows
from dspark.cache.parts.committed import check_whole, scan_parts, totals
from dspark.cache.parts.index import (
    write_index,
)
from dspark.cache.parts.part import PartJob, missing_files
from dspark.cache.parts.record import Block, PartRecord
from dspark.cache.records import Array, CodedSample, TokenSample
from dspark.cache.stored_manifest import read_manifest, write_manifest
from dspark.cache.target.files import write_target
from dspark.cache.target.frozen import FrozenTarget
from dspark.cache.target.restore import SAME_TARGET, restore


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
        """Rewrite missing or damaged files of ``target/``; returns their names. Raises
        MismatchError, changing nothing, if ``target`` and ``files`` are not the store's.
        """
        return restore(self.place, self.manifest, target, files)

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
        write_manifest(self.place, self.manifest)
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
            write_manifest(self.place, self.manifest)

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
        write_manifest(self.place, self.manifest)
        return self.manifest

    def reopen(self) -> None:
        """Mark the store incomplete again (a damaged part was removed and will be rewritten)."""
        self.manifest = dataclasses.replace(self.manifest, complete=False)
        write_manifest(self.place, self.manifest)

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
