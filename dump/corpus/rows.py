"""The corpus: rows in order, from any row on. A row of no known shape is a ``BadRow``; a file that cannot be read is an error that names it and the line.

A row is a chat (``messages``, or ``conversations`` as ShareGPT writes them) or already tokens (``input_ids`` and ``loss_mask``).
Rows are numbered from 0 over the non-blank lines, so a resumed dump continues exactly where it stopped.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from dspark.cache.errors import DataError, UsageError, first_line
from dspark.cache.target.frozen import file_sha256
from dspark.dump.corpus.shapes import ChatRow, TokenRow, parse_row

DATASET_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]%:+-]+))?")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is none of the shapes that are taken; ``detail`` names place and key. It is dropped and counted."""

    detail: str


@dataclass(frozen=True, slots=True)
class Row:
    """Row ``number`` of the corpus, 0-based; ``where``: file:line for messages."""

    number: int
    where: str
    value: ChatRow | TokenRow | BadRow


class Corpus(Protocol):
    """``id``: file name or data set id; ``sha256``: of the file, None for a hub data set."""

    @property
    def id(self) -> str: ...
    @property
    def sha256(self) -> str | None: ...
    def rows(self, start: int = 0) -> Iterator[Row]: ...
    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]: ...
    def count(self) -> int: ...
    def weights(self) -> list[int]:
        """What is known of each row's length without parsing it: the bytes of its line, or 1 each."""
        ...


def open_corpus(data: str) -> Corpus:
    """A JSONL file (also .gz), or a data set id (``org/name`` or ``org/name:split``) when no such file exists."""
    path = Path(data)
    if path.is_file():
        return JsonlCorpus(path)
    match = DATASET_ID.fullmatch(data)
    if path.exists() or match is None or path.suffix in (".jsonl", ".json", ".gz", ".txt"):
        what = "not a file" if path.exists() else "no such file"
        raise UsageError(
            f"--data {data}: {what}. Expected a JSONL file (.jsonl, .jsonl.gz) or a data set id such as org/name."
        )
    return HubCorpus(match["id"], match["split"] or "train")


class JsonlCorpus:
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self.sha256: str | None = file_sha256(path)

    def _open(self) -> BinaryIO:
        return cast(BinaryIO, gzip.open(self.path)) if self.path.suffix == ".gz" else open(self.path, "rb")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line) of the non-blank lines."""
        number = 0
        try:
            with self._open() as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self.path}: not a whole gzip file, broken after line {number}: {error}"
            ) from error

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def weights(self) -> list[int]:
        return [len(line) for _, line in self._lines()]

    def rows(self, start: int = 0) -> Iterator[Row]:
        return self.pick(lambda n: n >= start)

    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        """Only the rows whose number is ``wanted``; the others are not parsed."""
        for number, (line, text) in enumerate(self._lines()):
            if not wanted(number):
                continue
            where = f"{self.path}:{line}"
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: not JSON ({error}). Every line must be one JSON object."
                ) from error
            yield row_of(number, where, value)


class HubCorpus:
    """A data set of the Hugging Face hub, or of its local cache when offline."""

    def __init__(self, name: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UsageError(
                f"--data {name} is a data set id, and the package `datasets` is not installed: pip install 'dspark[hub]', "
                "or give a JSONL file."
            ) from error
        self.id = f"{name}:{split}"
        self.sha256: str | None = None
        try:
            self._rows = datasets.load_dataset(name, split=split)
        except (
            Exception
        ) as error:  # datasets raises a dozen unrelated kinds: offline, not found, gated, no such split
            raise DataError(
                f"--data {name}: not a file here, and the data set (split {split!r}) could not be loaded: "
                f"{type(error).__name__}: {first_line(error)}. Check the name, the split (org/name:split) and the network, or give a JSONL file."
            ) from error

    def count(self) -> int:
        return len(self._rows)

    def weights(self) -> list[int]:
        return [1] * len(self._rows)

    def rows(self, start: int = 0) -> Iterator[Row]:
        for number in range(start, len(self._rows)):
            where = f"{self.id} row {number}"
            yield row_of(number, where, self._rows[number])

    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        for number in range(len(self._rows)):
            if wanted(number):
                where = f"{self.id} row {number}"
                yield row_of(number, where, self._rows[number])


def row_of(number: int, where: str, value: Any) -> Row:
    """Row ``number``, of whatever form."""
    try:
        return Row(number, where, parse_row(value, where))
    except DataError as error:
        return Row(number, where, BadRow(str(error)))
