"""A corpus: rows in order, starting anywhere. A row that is not JSON or has no known shape is a
``BadRow``; a file that cannot be read is an error.

Rows are numbered from 0 (in a file of lines over those that are not blank), so a resumed dump
continues exactly where it stopped. ``open_corpus`` (``sources.py``) makes the corpus of a
``--data``.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from dspark.cache.errors import DataError, UsageError
from dspark.cache.files.checksum import file_sha256
from dspark.dump.corpus.shapes import ChatRow, TokenRow, parse_row

LINE_BYTES = 1 << 24  # of a line; longer ones are malformed
DEPTH = 64  # of lists and objects in a row
ZSTD = b"\x28\xb5\x2f\xfd"
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row of no known shape; ``detail`` names place and key. It is dropped and counted."""

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
        """Return what is known about each row's length without parsing it: the bytes of its line,
        or 1 each; 0 for a row that is left out.
        """
        ...


class JsonlCorpus:
    """One JSON object per line; plain, gzip or zstd, recognised by the first bytes."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.id = name or path.name
        self._state = _state(os.stat(path))
        self.sha256: str | None = file_sha256(path)

    def open(self) -> BinaryIO:
        with open(self.path, "rb") as file:
            magic = file.read(4)
        if magic.startswith(GZIP):
            return cast(BinaryIO, gzip.open(self.path))
        return open_zstd(self.path) if magic == ZSTD else open(self.path, "rb")

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield (1-based line number, line) of the non-blank lines; None for a line longer than
        ``LINE_BYTES``, which is not kept in memory.
        """
        number = 0
        self._refuse_other()
        try:
            with self.open() as file:
                while line := file.readline(LINE_BYTES + 1):
                    number += 1
                    if len(line) > LINE_BYTES:
                        while line and not line.endswith(b"\n"):
                            line = file.readline(LINE_BYTES)
                        yield number, None
                        continue
                    text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                    if text.strip():
                        yield number, text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self.path}: an incomplete gzip file, broken after line {number}: "
                f"{error}. Copy it again, or compress it again."
            ) from error
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read after line {number}: {error}. Is it complete?"
            ) from error
        self._refuse_other()

    def _refuse_other(self) -> None:
        """Raise DataError if the file is not the one whose ``sha256`` is known: its rows would be
        recorded under the hash of others.
        """
        try:
            now = _state(os.stat(self.path))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read any more: {error.strerror}.") from error
        if (
            now != self._state
            and now[0] == self._state[0]
            and file_sha256(self.path) == self.sha256
        ):
            self._state = now  # copied or touched; its bytes are the same
        if now != self._state:
            raise DataError(
                f"{self.path}: changed while it was read: it had {self._state[0]:,} bytes and has "
                f"{now[0]:,}, written since. Finished parts are kept; once nothing writes to it, "
                "rerun the same command with --resume, which compares their rows."
            )

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def weights(self) -> list[int]:
        return [0 if line is None else len(line) for _, line in self._lines()]

    def values(
        self, wanted: Callable[[int], bool] = lambda n: True
    ) -> Iterator[tuple[int, str, Any]]:
        """Yield (row number, file:line, parsed value) of the rows ``wanted``; a ``BadRow`` if the
        line is not JSON. Other rows are not parsed.
        """
        for number, (line, text) in enumerate(self._lines()):
            if wanted(number):
                where = f"{self.path}:{line}"
                yield number, where, parsed(text, where)

    def rows(self, start: int = 0) -> Iterator[Row]:
        return self.pick(lambda n: n >= start)

    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        """Yield only the rows whose number is ``wanted``; the others are not parsed."""
        for number, where, value in self.values(wanted):
            yield row_of(number, where, value)


def _state(file: os.stat_result) -> tuple[int, int]:
    """Return what tells that a file was written to: its bytes, and when that was."""
    return file.st_size, file.st_mtime_ns


class TableCorpus:
    """Rows looked up by number: a JSON array, or a data set of the ``datasets`` package."""

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
    """Several corpora, one after another, numbered consecutively."""

    def __init__(self, parts: Sequence[Corpus], name: str) -> None:
        self.parts, self.id = parts, name
        known = [p.sha256 for p in parts]
        text = "\n".join(f"{p.id} {p.sha256}" for p in parts)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest() if None not in known else None
        self._starts: list[int] | None = None

    def starts(self) -> list[int]:
        """The number of each corpus's first row, and one past the last row."""
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


class FirstRows:
    """The first ``limit`` rows of a corpus; rows that are left out count too."""

    def __init__(self, whole: Corpus, limit: int) -> None:
        self.whole, self.limit = whole, limit
        self.id, self.sha256 = whole.id, whole.sha256

    def count(self) -> int:
        return min(self.whole.count(), self.limit)

    def weights(self) -> list[int]:
        return self.whole.weights()[: self.limit]

    def rows(self, start: int = 0) -> Iterator[Row]:
        return itertools.takewhile(lambda row: row.number < self.limit, self.whole.rows(start))

    def pick(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        return self.whole.pick(lambda n: n < self.limit and wanted(n))


class SharedCorpus:
    """A share of a corpus's rows, chosen by a hash of their number, so that every run chooses the
    same ones. Row numbers do not change.
    """

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


def is_read_by_lines(corpus: Corpus) -> bool:
    """Tell whether a corpus is files of lines, so that another process can read it as well; a table
    in memory would be there twice.
    """
    match corpus:
        case JoinedCorpus():
            return all(is_read_by_lines(part) for part in corpus.parts)
        case FirstRows() | SharedCorpus():
            return is_read_by_lines(corpus.whole)
    return isinstance(corpus, JsonlCorpus)


def row_of(number: int, where: str, value: Any) -> Row:
    """Make row ``number``, whatever its form."""
    if isinstance(value, BadRow):
        return Row(number, where, value)
    try:
        row = parse_row(value, where)
        if isinstance(row, ChatRow) and depth([row.messages, row.tools, dict(row.kwargs)]) > DEPTH:
            raise DataError(f"{where}: lists and objects are nested more than {DEPTH} deep.")
        return Row(number, where, row)
    except DataError as error:
        return Row(number, where, BadRow(str(error)))


def parsed(text: bytes | None, where: str) -> Any:
    """The JSON value of a line, or a ``BadRow``."""
    if text is None:
        return BadRow(f"{where}: a line of more than {LINE_BYTES >> 20} MiB.")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(
            f"{where}: not JSON ({error}). Every line must be one JSON object{_hint(text)}."
        )


def depth(value: Any) -> int:
    """Return the nesting depth of ``value``, counted up to ``DEPTH + 1``."""
    out, level = 0, [value]
    while level and out <= DEPTH:
        level = [v for v in level if isinstance(v, list | dict)]
        out += bool(level)
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return out


def open_zstd(path: Path) -> BinaryIO:
    """Open a zstd file for reading its decompressed bytes."""
    try:
        import pyarrow
    except ImportError as error:
        raise UsageError(
            f"{path}: a zstd file; reading it needs pyarrow: pip install datasets, or "
            "decompress it."
        ) from error
    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return cast(BinaryIO, io.BufferedReader(stream))


def _hint(text: bytes) -> str:
    if text[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in text[:64]:
        return ", in UTF-8; this looks like UTF-16 or a binary file"
    if text.strip() in (b"{", b"["):
        return (
            "; this looks like JSON over several lines: a JSON array is read as one if "
            "the file begins with ["
        )
    try:
        start = text.decode().lstrip()[:1]
    except UnicodeDecodeError:
        return ", in UTF-8; this is text of another encoding: convert it with iconv"
    if start not in ("{", "["):
        return (
            "; this is not JSON at all: convert CSV or plain text into rows with "
            "`prompt` and `completion` first"
        )
    return ""
