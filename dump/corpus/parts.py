"""Divide rows into parts: fixed blocks of ``block_rows`` source rows.

A part is written, resumed and repaired as a unit. Its number alone determines its rows, so any
writer can make any part, and a change to other rows does not affect it. Each part records a hash of
its rows; a resumed dump compares the hashes of the parts that exist, and no others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dspark.cache.canonical import canonical
from dspark.cache.errors import DataError, MismatchError
from dspark.cache.files.layout import part_number
from dspark.cache.parts.arrays import join_tokens, split_tokens
from dspark.cache.records import Array, TokenSample
from dspark.dump.corpus.masks import Made, SampleMaker
from dspark.dump.corpus.rows import BadRow, Corpus, Row

if TYPE_CHECKING:
    from dspark.cache.parts.record import PartRecord

Making = Callable[[Iterator[Row]], Iterator[tuple[Row, Made]]]

# once so many rows were read, too many dropped ones stop the dump early
EARLY_ROWS = 1000


@dataclass(slots=True)
class PartRows:
    """Samples (possibly none) of rows ``[row_start, row_stop)`` of source number ``source``.
    ``rows_sha256``: hash of exactly those rows.
    """

    index: int
    row_start: int
    row_stop: int
    samples: list[TokenSample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    rows_sha256: str | None = None

    @property
    def tokens(self) -> int:
        return sum(len(s.input_ids) for s in self.samples)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes as a few arrays, not as thousands of objects."""
        arrays = join_tokens(self.samples)[0]
        rest = (self.dropped, self.truncated, self.rows_sha256)
        return _rebuilt, (self.index, self.row_start, self.row_stop, arrays, *rest)


def _rebuilt(
    index: int, row_start: int, row_stop: int, arrays: dict[str, Array], *rest: Any
) -> PartRows:
    return PartRows(index, row_start, row_stop, split_tokens(arrays), *rest)


class PartReader:
    """Reads a corpus block by block, skipping committed parts. ``note`` is called with each dropped
    row. ``make``: rows -> samples in order, instead of ``maker`` if that alone is not fast enough
    (``tokenise.Tokenisers``). ``takes``: tells which part numbers to make; the rows of others are
    not parsed.
    """

    def __init__(
        self,
        corpus: Corpus,
        maker: SampleMaker | None,
        *,
        block_rows: int,
        limit: int | None,
        max_dropped: float,
        source: int = 0,
        note: Callable[[str], None] = lambda line: None,
        make: Making | None = None,
        takes: Callable[[int], bool] = lambda part: True,
    ) -> None:
        self.corpus, self.source = corpus, source
        if make is None:
            assert maker is not None
            one = maker.make
            make = lambda rows: ((row, one(row)) for row in rows)  # noqa: E731
        self._make: Making = make
        self.block_rows, self.limit, self.max_dropped = block_rows, limit, max_dropped
        self.note, self.takes = note, takes
        self.total = 0  # rows of the corpus, once ``parts`` has reached the end
        self.rows_read = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()  # what the samples of kept rows leave out
        self.harmed = 0  # kept rows that lost a usable answer

    def parts(self, committed: Mapping[int, PartRecord]) -> Iterator[PartRows]:
        """Yield the parts still to be written, in order. Raises MismatchError if the rows of a
        committed part have changed.
        """
        begun: deque[tuple[PartRows, int]] = deque()  # with the rows that are left

        def rows() -> Iterator[Row]:
            for part, rows_of_it in self.blocks(committed):
                begun.append((part, len(rows_of_it)))
                yield from rows_of_it

        left = None
        for row, made in self._make(rows()):
            while begun[0][1] == 0:  # no row of the block is in the corpus
                yield begun.popleft()[0]
            part, count = begun[0]
            left = count if left is None else left
            self._collect(part, row, made)
            left -= 1
            if not left:
                left = None
                self.check_dropped()
                yield begun.popleft()[0]
        yield from (part for part, _ in begun)

    def blocks(self, committed: Mapping[int, PartRecord]) -> Iterator[tuple[PartRows, list[Row]]]:
        """Yield each part still to be written, empty, with its rows."""
        following = 0
        for block, own in self._by_block():
            part = PartRows(
                part_number(self.source, block),
                block * self.block_rows,
                (block + 1) * self.block_rows,
            )
            if own and (part.index in committed or self.takes(part.index)):
                part.rows_sha256 = rows_sha256(own)
            following = part.index + 1
            if self._last is not None and self._last < part.row_stop:
                part.row_stop = self._last
            if part.index in committed:
                self._compare(part, committed[part.index])
                self.dropped.update(committed[part.index].dropped)
                self.rows_read += part.row_stop - part.row_start
                continue
            if self.takes(part.index):
                yield part, own
        self.total = self._last or 0
        beyond = sorted(
            i for i, r in committed.items() if r.source == self.source and i >= following
        )
        if beyond:
            raise MismatchError(
                f"{self.corpus.id}: part {beyond[0]} of the store holds rows from "
                f"{committed[beyond[0]].row_start:,} on, but the corpus ends before them. "
                "It is not the corpus that the store was started with."
            )

    def _by_block(self) -> Iterator[tuple[int, list[Row]]]:
        """Group the rows by block; a block without rows in the corpus is empty. ``_last``: where
        the rows end, once known.
        """
        self._last: int | None = None
        stream = self.corpus.rows()
        if self.limit is not None:
            stream = itertools.takewhile(lambda row: row.number < (self.limit or 0), stream)
        following = 0
        held: tuple[int, list[Row]] | None = None
        for block, rows in itertools.groupby(stream, lambda row: row.number // self.block_rows):
            if held is not None:
                yield held
            yield from ((i, []) for i in range(following, block))
            held, following = (block, list(rows)), block + 1
        if held is not None:
            self._last = held[1][-1].number + 1
            yield held

    def _compare(self, part: PartRows, record: PartRecord) -> None:
        """Check that the rows of a committed part are the ones that it was made from."""
        same = (record.row_start, record.row_stop) == (part.row_start, part.row_stop)
        if same and record.rows_sha256 in (None, part.rows_sha256):
            return
        raise MismatchError(
            f"{self.corpus.id}: rows {part.row_start:,}-{part.row_stop - 1:,} are not the "
            f"ones that part {part.index} was made from (rows "
            f"{record.row_start:,}-{record.row_stop - 1:,}, sha256 {record.rows_sha256}; "
            f"found {part.rows_sha256}). Restore the rows. To rebuild the part from the new ones, "
            "delete its folder in parts/, if the store is complete run dspark-tools verify "
            "--drop-damaged, and --resume."
        )

    def _collect(self, part: PartRows, row: Row, made: Made) -> None:
        self.rows_read += 1
        self.notes.update(made.notes)
        for note in made.notes:
            self.note(f"{row.where}: {note}" + (f" ({made.detail})" if made.detail else ""))
        if made.samples:
            part.samples += made.samples
            part.truncated += made.truncated
            self.harmed += made.harmed
        else:
            assert made.dropped is not None
            self.drop(part, row, made.dropped, made.detail)
        if self.rows_read % EARLY_ROWS == 0:
            self.check_dropped()

    def drop(self, part: PartRows, row: Row, reason: str, detail: str = "") -> None:
        """Count ``row`` as dropped."""
        part.dropped[reason] += 1
        self.dropped[reason] += 1
        self.note(f"{row.where}: dropped: {reason}" + (f" ({detail})" if detail else ""))

    def check_dropped(self, at_end: bool = False) -> None:
        """Raise DataError if more than the allowed share of the rows gave no sample."""
        dropped = sum(self.dropped.values())
        if self.rows_read < EARLY_ROWS and not at_end:
            return
        if self.rows_read and dropped + self.harmed > self.max_dropped * self.rows_read:
            reasons = "; ".join(f"{reason}: {n:,}" for reason, n in self.dropped.most_common())
            reasons = f" ({reasons})" if reasons else ""
            lost = "; ".join(f"{note}: {n:,}" for note, n in self.notes.most_common())
            harmed = f", and {self.harmed:,} lost an answer ({lost})" if self.harmed else ""
            raise DataError(
                f"{self.corpus.id}: {dropped:,} of the first {self.rows_read:,} rows gave no "
                f"sample{reasons}{harmed}, more than the allowed share of "
                f"{self.max_dropped:.0%}. Is it the right corpus, template and "
                "--assistant-pattern? --max-dropped raises the limit."
            )


class SourcesReader:
    """Reads several sources one after another, each with its own ``PartReader`` and its own count
    of dropped rows, so that other sources cannot hide one that is not understood.
    """

    def __init__(self, readers: Sequence[PartReader]) -> None:
        self.readers = readers

    @property
    def notes(self) -> Counter[str]:
        return sum((r.notes for r in self.readers), Counter())

    def parts(self, committed: Mapping[int, PartRecord]) -> Iterator[PartRows]:
        """Yield the missing parts of all sources."""
        for reader in self.readers:
            yield from reader.parts(committed)

    def check_dropped(self, at_end: bool = False) -> None:
        """Raise DataError, naming the source, if more than the allowed share of a source's rows
        gave no sample.
        """
        for reader in self.readers:
            reader.check_dropped(at_end)


def rows_sha256(rows: list[Row]) -> str:
    """Return the sha256 of the rows' content as it is used, whatever file it came from."""
    total = hashlib.sha256()
    for row in rows:
        value: dict[str, Any] = {"malformed": True}
        if not isinstance(row.value, BadRow):
            # Not asdict, which copies every message: it took most of the hash's time.
            own = ((f.name, getattr(row.value, f.name)) for f in dataclasses.fields(row.value))
            value = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in own}
        total.update(canonical({**value, "number": row.number}) + b"\n")
    return total.hexdigest()
