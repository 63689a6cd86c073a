"""Writing a store: create or resume, commit parts in any order, finish. Append-only; a committed part is never touched again.

A store whose process died has the parts that were committed and nothing else that a reader would take for data. ``resume`` refuses a run
that would not write the same store (another target, layers, bits, corpus, length), naming every difference.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import zarr

from dspark.cache.codec.base import Codec
from dspark.cache.codec.fields import from_fields
from dspark.cache.errors import DamagedCacheError, ExistsError, MismatchError
from dspark.cache.files.atomic import (
    STAGING,
    clear_staging,
    commit_folder,
    fsync_path,
    fsync_tree,
    write_errors,
    write_file,
)
from dspark.cache.files.index import PART_ARRAYS, build_index, index_specs
from dspark.cache.files.layout import (
    INDEX,
    INDEX_KEY,
    PARTS,
    ROOT_KEY,
    TARGET,
    TARGET_WEIGHTS,
    PartLayout,
    part_name,
)
from dspark.cache.files.part import (
    Array,
    PartJob,
    PartRecord,
    assemble,
    group_metadata,
    join_tokens,
    missing_files,
    read_record,
    write_array,
    write_attributes,
)
from dspark.cache.manifest import Counts, Json, Manifest, sealed
from dspark.cache.reader import read_manifest
from dspark.cache.records import CodedSample, TokenSample
from dspark.cache.target.files import damaged_files, write_target
from dspark.cache.target.frozen import FrozenTarget

SAME_TARGET = "Use the target's revision and the dtype that the store was started with, or --overwrite."


class StoreWriter:
    """One writer a store. ``committed``: part index -> record, of the parts that are on disk."""

    def __init__(self, path: Path, manifest: Manifest, committed: dict[int, PartRecord]) -> None:
        self.path = path
        self.manifest = manifest
        self.committed = committed
        self.codec: Codec = from_fields(manifest.aux, manifest.last, str(path))
        self.layout = PartLayout(self.codec, len(manifest.layers), manifest.target.hidden_size)

    @classmethod
    def create(
        cls,
        path: str | Path,
        manifest: Manifest,
        target: FrozenTarget,
        files: Mapping[str, bytes],
        *,
        overwrite: bool = False,
    ) -> StoreWriter:
        """Begin a new store. ``files``: small files kept under ``target/`` (tokenizer, chat template).

        Raises ExistsError when ``path`` exists, unless ``overwrite``.
        """
        path = Path(path)
        if path.exists():
            if not overwrite:
                raise ExistsError(
                    f"{path} exists. Use --resume to continue it, --overwrite to replace it, or another --output."
                )
            if not (path / "zarr.json").is_file() or not (path / PARTS).is_dir():
                raise ExistsError(
                    f"{path} exists and is not a dspark store: it is not overwritten. Choose another --output."
                )
        staged = path.with_name(STAGING + path.name)
        with write_errors(path):
            if staged.exists():
                shutil.rmtree(staged)
            sha = write_target(staged / TARGET, target, manifest.target.config, files)
            manifest = dataclasses.replace(
                manifest, target=dataclasses.replace(manifest.target, weights_sha256=sha)
            )
            zarr.create_group(staged / PARTS, zarr_format=3)
            write_attributes(staged, ROOT_KEY, sealed(manifest.to_json()))
            if path.exists():
                shutil.rmtree(path)
        commit_folder(staged, path)
        return cls(path, manifest, {})

    @classmethod
    def resume(cls, path: str | Path, manifest: Manifest) -> StoreWriter:
        """Go on with the store at ``path``. Raises MismatchError unless ``manifest`` plans the same store.

        A committed part whose files are missing or cut short raises DamagedCacheError: ``dspark-tools verify --drop-damaged`` removes
        such parts, and the next ``--resume`` writes them again. ``restore_target`` does the same for ``target/``, once the weights are read.
        """
        path = Path(path)
        found = read_manifest(path)
        found.same_plan(manifest, str(path))
        clear_staging(path)
        clear_staging(path / PARTS)
        committed = scan_parts(path)
        for index, record in committed.items():
            for finding in missing_files(path / PARTS / part_name(index), record):
                raise DamagedCacheError(f"{finding}. Run: dspark-tools verify --drop-damaged {path}")
        return cls(path, found, committed)

    def restore_target(self, target: FrozenTarget, files: Mapping[str, bytes]) -> list[str]:
        """Write the files of ``target/`` that are missing or damaged again, atomically one by one; returns their names.

        Raises MismatchError, changing nothing, where ``target`` and ``files`` are not what the manifest has the hashes of: the parts to come would
        hold states of another model than those that are there. Hashes the weights in the store and ``target`` once each; writes only if something is wrong.
        """
        folder, staged = self.path / TARGET, self.path / (STAGING + TARGET)
        wrong = sorted(
            {*damaged_files(folder, self.manifest), *(n for n in files if not (folder / n).is_file())}
        )
        if not wrong:
            expected, found = self.manifest.target.weights_sha256, target.sha256_in(folder / TARGET_WEIGHTS)
            if found != expected:
                raise MismatchError(
                    f"{self.path}: this run's target is not the one that the store was started with: sha256 of its embedding, final norm and head is {found}, "
                    f"the manifest says {expected}. {SAME_TARGET}"
                )
            return []
        with write_errors(folder):
            write_target(staged, target, self.manifest.target.config, files)
            if other := damaged_files(staged, self.manifest):
                shutil.rmtree(staged)
                raise MismatchError(
                    f"{folder}: {', '.join(wrong)} must be written again, but this run's target is not the one that the store was started with.\n  "
                    + "\n  ".join(text.replace(str(staged), "this run") for text in other.values())
                    + f"\n{SAME_TARGET}"
                )
            fsync_tree(staged)
            folder.mkdir(exist_ok=True)
            for name in wrong:
                os.replace(staged / name, folder / name)
            fsync_path(folder)
            shutil.rmtree(staged)
        return wrong

    def commit(
        self,
        index: int,
        samples: Sequence[CodedSample],
        *,
        row_start: int,
        row_stop: int,
        dropped: Mapping[str, int],
        truncated: int,
    ) -> PartRecord:
        """Write part ``index`` (source rows ``[row_start, row_stop)``) durably; nothing of it counts when it raises.

        Synchronous. Different parts may be committed from different threads at once.
        """
        arrays, states = assemble(samples, self.layout)
        job = self._job(index, arrays, row_start, row_stop, dropped, truncated)
        return self.add(job.write(states))

    def job(
        self,
        index: int,
        tokens: Sequence[TokenSample],
        *,
        row_start: int,
        row_stop: int,
        dropped: Mapping[str, int],
        truncated: int,
    ) -> PartJob:
        """Part ``index`` ready to be written wherever its states are; its record then has to be given to ``add``."""
        return self._job(index, join_tokens(tokens)[0], row_start, row_stop, dropped, truncated)

    def add(self, record: PartRecord) -> PartRecord:
        """Count a part that a ``PartJob`` has written."""
        self.committed[record.index] = record
        return record

    def _job(
        self,
        index: int,
        arrays: dict[str, Array],
        row_start: int,
        row_stop: int,
        dropped: Mapping[str, int],
        truncated: int,
    ) -> PartJob:
        samples = arrays["sample_row"].shape[0]
        assert samples, "a part holds at least one sample"
        assert index not in self.committed
        before, after = self.committed.get(index - 1), self.committed.get(index + 1)
        if (before and before.row_stop != row_start) or (after and after.row_start != row_stop):
            raise MismatchError(
                f"{self.path}: part {index} would cover source rows {row_start}-{row_stop}, but its neighbours end at "
                f"{before and before.row_stop} and begin at {after and after.row_start}: "
                "the corpus is not the one the store was begun with."
            )
        tokens, stored = arrays["input_ids"].shape[0], int(arrays["sample_last_start"][-1])
        return PartJob(
            parts=self.path / PARTS,
            index=index,
            arrays=arrays,
            specs=self.layout.arrays(tokens, samples, stored),
            row_start=row_start,
            row_stop=row_stop,
            dropped=dict(dropped),
            truncated=truncated,
        )

    def finish(
        self,
        *,
        rows_read: int,
        dropped: Mapping[str, int] | None = None,
        truncated: int = 0,
        quality: Json | None = None,
    ) -> Manifest:
        """Write the sample index and mark the store complete. ``dropped``/``truncated``: of the rows after the last part."""
        records = [self.committed[i] for i in sorted(self.committed)]
        assert [r.index for r in records] == list(range(len(records))), (
            "finish() before all parts were committed"
        )
        total: Counter[str] = Counter(dropped or {})
        for record in records:
            total.update(record.dropped)
        counts = Counts(
            parts=len(records),
            samples=sum(r.samples for r in records),
            tokens=sum(r.tokens for r in records),
            supervised_tokens=sum(r.supervised_tokens for r in records),
            last_rows=sum(r.last_rows for r in records),
            rows_read=rows_read,
            truncated=truncated + sum(r.truncated for r in records),
            dropped=dict(sorted(total.items())),
        )
        write_index(self.path, records)
        self.manifest = dataclasses.replace(
            self.manifest, counts=counts, complete=True, quality=quality or {}
        )
        self._write_manifest()
        return self.manifest

    def reopen(self) -> None:
        """Mark the store incomplete again (a damaged part was removed and will be written anew)."""
        self.manifest = dataclasses.replace(self.manifest, complete=False)
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_file(self.path / "zarr.json", group_metadata(ROOT_KEY, sealed(self.manifest.to_json())))

    def close(self) -> None:
        """Nothing is held open between commits; here so that a writer can be used in a ``with``."""

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def scan_parts(path: Path) -> dict[int, PartRecord]:
    """The records of every committed part, by index."""
    names = sorted(p.name for p in (path / PARTS).iterdir() if p.is_dir() and not p.name.startswith(STAGING))
    out = {}
    for name in names:
        record = read_record(path / PARTS / name)
        out[record.index] = record
    return out


def write_index(path: Path, records: Sequence[PartRecord]) -> None:
    """Write ``index/``, so that opening a large store reads a few files and not a folder a part."""

    def arrays(record: PartRecord) -> dict[str, Array]:
        group = zarr.open_group(path / PARTS / part_name(record.index), mode="r")
        return {name: np.asarray(group.get(name)) for name in PART_ARRAYS}

    index = build_index(arrays(record) for record in records)
    staged = path / (STAGING + INDEX)
    clear_staging(path)
    with write_errors(path / INDEX):
        zarr.create_group(staged, zarr_format=3)
        for spec in index_specs(index):
            write_array(staged, spec, index[spec.name])
        body = {"part_crc32c": [sealed(r.to_json())["crc32c"] for r in records]}
        write_attributes(staged, INDEX_KEY, sealed(body))
        if (path / INDEX).exists():
            shutil.rmtree(path / INDEX)
    commit_folder(staged, path / INDEX)
