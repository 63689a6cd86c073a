"""Rows -> parts: consecutive rows until ``part_tokens`` tokens are together. The part is what is written, resumed and repaired as one.

Where a part ends depends only on the corpus and the plan, never on how far an earlier run came, so a resumed store is the one an unbroken run
writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING

from dspark.cache.errors import DataError
from dspark.cache.records import TokenSample
from dspark.dump.corpus.masks import Made, SampleMaker
from dspark.dump.corpus.rows import Corpus, Row

if TYPE_CHECKING:
    from dspark.cache.files.part import PartRecord

Making = Callable[[Iterator[Row]], Iterator[tuple[Row, Made]]]

EARLY_ROWS = 1000  # from here on, too many dropped rows stop the dump before the corpus has been read


@dataclass(slots=True)
class PartRows:
    """Samples of source rows ``[row_start, row_stop)``. Without samples it is the tail: rows after the last part, all dropped."""

    index: int
    row_start: int
    row_stop: int
    samples: list[TokenSample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(s.input_ids) for s in self.samples)


class PartReader:
    """Reads a corpus part by part, past the parts that are committed. ``note`` is told of each dropped row.

    ``make``: rows -> samples in order, where ``maker`` alone is not fast enough (``tokenise.Tokenisers``).
    """

    def __init__(
        self,
        corpus: Corpus,
        maker: SampleMaker,
        *,
        part_tokens: int,
        limit: int | None,
        max_dropped: float,
        note: Callable[[str], None] = lambda line: None,
        make: Making | None = None,
    ) -> None:
        self.corpus = corpus
        self._make: Making = make or (lambda rows: ((row, maker.make(row)) for row in rows))
        self.part_tokens, self.limit, self.max_dropped = part_tokens, limit, max_dropped
        self.note = note
        self.rows_read = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()  # what is not in the samples of rows that were kept

    def parts(self, committed: Mapping[int, PartRecord]) -> Iterator[PartRows]:
        """The parts still to be written, in order; the last one yielded is the tail (no samples), maybe empty."""
        stream: Iterator[tuple[Row, Made]] | None = None
        for index in count():
            if index in committed:
                self.rows_read = committed[index].row_stop
                self.dropped.update(committed[index].dropped)
                stream = None
                continue
            if stream is None:
                left = None if self.limit is None else max(self.limit - self.rows_read, 0)
                stream = self._make(islice(self.corpus.rows(self.rows_read), left))
            part = self._collect(index, stream)
            self.check_dropped()
            yield part
            if not part.samples:
                return

    def _collect(self, index: int, stream: Iterator[tuple[Row, Made]]) -> PartRows:
        part = PartRows(index, self.rows_read, self.rows_read)
        tokens = 0
        while tokens < self.part_tokens:
            entry = next(stream, None)
            if entry is None:
                break
            row, made = entry
            self.notes.update(made.notes)
            for note in made.notes:
                self.note(f"{row.where}: {note}" + (f" ({made.detail})" if made.detail else ""))
            self.rows_read = part.row_stop = row.number + 1
            if made.samples:
                part.samples += made.samples
                part.truncated += made.truncated
                tokens += sum(len(s.input_ids) for s in made.samples)
            else:
                assert made.dropped is not None
                part.dropped[made.dropped] += 1
                self.dropped[made.dropped] += 1
                self.note(
                    f"{row.where}: dropped: {made.dropped}" + (f" ({made.detail})" if made.detail else "")
                )
            if self.rows_read % EARLY_ROWS == 0:
                self.check_dropped()
        return part

    def check_dropped(self, at_end: bool = False) -> None:
        """Raise DataError if more than the allowed share of the rows gave no sample."""
        dropped = sum(self.dropped.values())
        if self.rows_read < EARLY_ROWS and not at_end:
            return
        if self.rows_read and dropped > self.max_dropped * self.rows_read:
            reasons = "; ".join(f"{reason}: {n:,}" for reason, n in self.dropped.most_common())
            raise DataError(
                f"{self.corpus.id}: {dropped:,} of the first {self.rows_read:,} rows gave no sample ({reasons}), more than the allowed share of "
                f"{self.max_dropped:.0%}. Is it the right corpus, template and --assistant-pattern? --max-dropped raises the limit."
            )
