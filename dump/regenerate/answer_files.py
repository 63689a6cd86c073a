"""Answers on disk, beside the store: ``<store>.answers/``, a file per part, during the dump;
``<store>.answers.jsonl`` once it is complete. Nothing is lost in between, however a dump ends: a
part's file is on disk before the part; the joined file is replaced before the store is marked
complete; the parts' files are deleted after that.

When a complete store is repaired, the remaining parts no longer have files: their lines are in the
joined file, found by the rows of the part's record. Its lines ascend by row, so one pass is enough.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache import json_text
from dspark.cache.errors import CacheError, DamagedCacheError, ExistsError, UsageError
from dspark.cache.files.atomic import fsync_path, staged, write_errors, write_file
from dspark.cache.files.layout import PARTS, part_name
from dspark.cache.files.urls import Where, beside
from dspark.dump.engines.answers import MASK_RULE

if TYPE_CHECKING:
    from dspark.cache.parts.record import PartRecord


@dataclass(frozen=True, slots=True)
class AnswerFiles:
    """The answers of the store at ``store``."""

    store: Path

    @classmethod
    def of(cls, store: Where) -> AnswerFiles:
        """Return those of a dump into ``store``; only a local store has any."""
        return cls(beside(store, ""))

    @property
    def folder(self) -> Path:
        return self.store.with_name(self.store.name + ".answers")

    @property
    def joined(self) -> Path:
        return self.store.with_name(self.store.name + ".answers.jsonl")

    def go_with_the_store(self) -> bool:
        """Tell whether the existing store was answered by its target, so that these answers are
        deleted with it. False for a store that cannot be read, since the files beside it may be
        anything.
        """
        from dspark.cache.stored_manifest import (
            read_manifest,  # imports zarr, which a plan does not need
        )

        try:
            return read_manifest(self.store).dump.mask_rule.startswith(MASK_RULE)
        except CacheError:
            return False

    def refuse_other(self, data: Sequence[str], overwrite: bool) -> None:
        """Refuse, before a new store, to overwrite answers that --overwrite does not cover, or the
        corpus itself.
        """
        for name in data:
            if not (Path(name).exists() and self.joined.exists() and self.joined.samefile(name)):
                continue
            raise UsageError(
                f"--data {name} is the file that the answers of {self.store} are written "
                "to, so it would be replaced. Choose another --output."
            )
        for path in (self.joined, self.folder):
            if path.exists() and not overwrite:
                raise ExistsError(
                    f"{path} exists: it holds the answers of an earlier store. Move it, "
                    "use --overwrite to replace it, or choose another --output."
                )

    def begin(self) -> None:
        """Delete old answers before the first part: a later join must not take them for this
        store's.
        """
        with write_errors(self.joined):
            self.joined.unlink(missing_ok=True)
        self.clear()

    def save(self, index: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Save the answers of part ``index``: an object per sample, with its ``row``."""
        if not self.folder.exists():
            with write_errors(self.folder):
                self.folder.mkdir()
                fsync_path(self.folder.parent)
        # default: a data set's dates.
        lines = "".join(json.dumps(a, ensure_ascii=False, default=str) + "\n" for a in answers)
        write_file(self._of(index), lines.encode())

    def check(self, records: Mapping[int, PartRecord]) -> None:
        """Raise DamagedCacheError unless the answers of all these parts are found."""
        for _ in self._lines(records):
            pass

    def join(self, records: Mapping[int, PartRecord]) -> None:
        """Replace the joined file by the answers of all parts, in order. Raises DamagedCacheError,
        leaving it as it is, if some are missing.
        """
        with staged(self.joined, replace=True) as new, open(new, "wb") as file:
            for lines in self._lines(records):
                file.writelines(lines)

    def clear(self) -> None:
        """Delete the parts' files: their contents are in the joined file, or useless."""
        if self.folder.exists():
            with write_errors(self.folder):
                shutil.rmtree(self.folder)

    def _of(self, index: int) -> Path:
        return self.folder / f"{index:08d}.jsonl"

    def _lines(self, records: Mapping[int, PartRecord]) -> Iterator[list[bytes]]:
        """Yield the answers of each part, in order."""
        whole = all(self._of(i).exists() for i in records)
        old = iter(()) if whole or not self.joined.exists() else answers_in(self.joined)
        row, line = next(old, (None, b""))
        for index in sorted(records):
            record = records[index]
            found: list[tuple[int, bytes]] = []
            while row is not None and row < record.row_stop:
                found.append((row, line))
                row, line = next(old, (None, b""))
            where = self.joined
            if self._of(index).exists():
                where, found = self._of(index), list(answers_in(self._of(index)))
            own = [text for row_, text in found if record.row_start <= row_ < record.row_stop]
            if sum(samples_of(line) for line in own) != record.samples:
                raise DamagedCacheError(
                    f"{where}: found {len(own)} answers to the rows {record.row_start:,} "
                    f"to {record.row_stop - 1:,}, expected {record.samples}: those of "
                    f"part {index}. If {self.joined.name} was moved or changed, restore "
                    "it and rerun the same command with --resume. Otherwise, to have "
                    "these rows answered again, delete "
                    f"{self.store / PARTS / part_name(index)}, run dspark-tools verify "
                    f"--drop-damaged {self.store}, and the same command with --resume."
                )
            yield own


def answers_in(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the row and line of each answer in a file."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield row_of(line, f"{path}:{number}"), line
    except OSError as error:
        raise DamagedCacheError(f"{path}: could not be read: {error.strerror}.") from error


def samples_of(line: bytes) -> int:
    """Return how many samples a line's conversation gave: one if an earlier release wrote no
    number.
    """
    found = json_text.loads(line).get("samples", 1)
    return found if isinstance(found, int) else 0


def row_of(line: bytes, where: str) -> int:
    """Return the row that a line answers."""
    try:
        row = json_text.loads(line)["row"]
    except (ValueError, KeyError, TypeError):
        row = None
    if not isinstance(row, int) or not line.endswith(b"\n"):
        raise DamagedCacheError(
            f"{where}: found {line[:80]!r}, expected a line that --regenerate wrote, with "
            "its `row`. Restore the file and rerun the same command with --resume."
        )
    return row
