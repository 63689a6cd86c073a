"""A corpus: rows in order, from any row on. A row of no known shape is a ``BadRow``; what cannot be read at all is an error that names place and line.

Rows are numbered from 0 (in a file of lines over those that are not blank), so a resumed dump continues exactly
where it stopped. ``open_corpus`` (``sources.py``) makes the corpus of a ``--data``.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from dspark.cache.errors import DataError, UsageError
from dspark.cache.files.checksum import file_sha256
from dspark.dump.corpus.shapes import ChatRow, TokenRow, parse_row

ZSTD = b"\x28\xb5\x2f\xfd"
GZIP = b"\x1f\x8b"


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
        """What is known of each row's length without parsing it: the bytes of its line, or 1 each; 0 of a row that is left out."""
        ...


class JsonlCorpus:
    """One JSON object per line; plain, gzip or zstd, by what the file begins with."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.id = name or path.name
        self.sha256: str | None = file_sha256(path)

    def open(self) -> BinaryIO:
        with open(self.path, "rb") as file:
            magic = file.read(4)
        if magic.startswith(GZIP):
            return cast(BinaryIO, gzip.open(self.path))
        return open_zstd(self.path) if magic == ZSTD else open(self.path, "rb")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line) of the non-blank lines."""
        number = 0
        try:
            with self.open() as file:
                for number, line in enumerate(file, start=1):
                    text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                    if text.strip():
                        yield number, text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self.path}: not a whole gzip file, broken after line {number}: {error}"
            ) from error
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read behind line {number}: {error}") from error

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
                    f"{where}: not JSON ({error}). Every line must be one JSON object{_hint(text)}."
                ) from error
            yield row_of(number, where, value)


class TableCorpus:
    """Rows that are looked up by number: a JSON array, or a data set of the package ``datasets``."""

    def __init__(self, table: Sequence[Any], name: str, sha256: str | None) -> None:
        self.id, self.sha256, self._rows = name, sha256, table

    def count(self) -> int:
        return len(self._rows)

    def weights(self) -> list[int]:
        return [1] * len(self._rows)

    def rows(self, start: int = 0) -> Iterator[Row]:
        return self._numbered(range(start, len(self._rows)))

    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        return self._numbered(n for n in range(len(self._rows)) if wanted(n))

    def _numbered(self, numbers: Any) -> Iterator[Row]:
        for number in numbers:
            yield row_of(number, f"{self.id} row {number}", self._rows[number])


class JoinedCorpus:
    """Several corpora, one behind another, numbered through."""

    def __init__(self, parts: Sequence[Corpus], name: str) -> None:
        self.parts, self.id = parts, name
        known = [p.sha256 for p in parts]
        text = "\n".join(f"{p.id} {p.sha256}" for p in parts)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest() if None not in known else None
        self._starts: list[int] | None = None

    def starts(self) -> list[int]:
        """The number of each corpus's first row, and of the row behind the last."""
        if self._starts is None:
            self._starts = list(itertools.accumulate((p.count() for p in self.parts), initial=0))
        return self._starts

    def count(self) -> int:
        return self.starts()[-1]

    def weights(self) -> list[int]:
        return [w for p in self.parts for w in p.weights()]

    def rows(self, start: int = 0) -> Iterator[Row]:
        for part, first, stop in zip(self.parts, self.starts(), self.starts()[1:], strict=False):
            if stop > start:
                for row in part.rows(max(start - first, 0)):
                    yield Row(first + row.number, row.where, row.value)

    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        for part, first in zip(self.parts, self.starts(), strict=False):
            for row in part.pick(lambda n, first=first: wanted(first + n)):  # type: ignore[misc]
                yield Row(first + row.number, row.where, row.value)


class SharedCorpus:
    """A share of a corpus's rows, chosen by a hash of their number, so that every run chooses the same ones. Numbers stay."""

    def __init__(self, whole: Corpus, share: float) -> None:
        self.whole, self.share = whole, share
        self.id, self.sha256 = f"{whole.id}={share:g}", whole.sha256

    def takes(self, number: int) -> bool:
        digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.share * 2**64

    def count(self) -> int:
        return self.whole.count()

    def weights(self) -> list[int]:
        return [w if self.takes(n) else 0 for n, w in enumerate(self.whole.weights())]

    def rows(self, start: int = 0) -> Iterator[Row]:
        return self.whole.pick(lambda n: n >= start and self.takes(n))

    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        return self.whole.pick(lambda n: self.takes(n) and wanted(n))


def row_of(number: int, where: str, value: Any) -> Row:
    """Row ``number``, of whatever form."""
    try:
        return Row(number, where, parse_row(value, where))
    except DataError as error:
        return Row(number, where, BadRow(str(error)))


def open_zstd(path: Path) -> BinaryIO:
    """A zstd file as the bytes in it."""
    try:
        import pyarrow
    except ImportError as error:
        raise UsageError(
            f"{path}: a zstd file; reading it needs pyarrow: pip install datasets, or unpack it."
        ) from error
    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return cast(BinaryIO, io.BufferedReader(stream))


def _hint(text: bytes) -> str:
    if text[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in text[:64]:
        return ", in UTF-8; this looks like UTF-16 or a binary file"
    if text.strip() in (b"{", b"["):
        return "; this looks like JSON over several lines: a JSON array is read whole where the file begins with ["
    return ""
