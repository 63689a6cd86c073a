"""Read rows, and have them tokenised, in a process of its own; whole parts arrive, a few arrays
each.

Reading, hashing and exchanging rows with the processes that tokenise is Python, some 0.3 ms per row
in three threads. In the process that launches a fast target's kernels, those threads took its lock
so often that the GPU was idle a fifth of the time
(docs/log/2026-11-26-launching-thread-of-a-dump.md).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DsparkError, EngineError
from dspark.dump.corpus.parts import PartReader, PartRows, SourcesReader
from dspark.dump.corpus.tokenise import Tokenisers
from dspark.dump.workers import WorkerPool, pickled

if TYPE_CHECKING:
    from dspark.cache.parts.record import PartRecord
    from dspark.dump.corpus.masks import SampleMaker

PARTS = 2  # asked for ahead


@dataclass(frozen=True, slots=True)
class Counted:
    """What a ``PartReader`` has counted."""

    total: int
    rows_read: int
    dropped: Counter[str]
    notes: Counter[str]
    harmed: int

    @classmethod
    def by(cls, reader: PartReader) -> Counted:
        return cls(reader.total, reader.rows_read, reader.dropped, reader.notes, reader.harmed)

    def give(self, reader: PartReader) -> None:
        reader.total, reader.rows_read, reader.harmed = self.total, self.rows_read, self.harmed
        reader.dropped, reader.notes = self.dropped, self.notes


@dataclass(frozen=True, slots=True)
class Step:
    """What the process answers: a part, or how the rows ended (``counted``, of every source), or
    the error they ended with. ``notes``: lines noted since the step before.
    """

    notes: list[str]
    part: PartRows | None = None
    counted: list[Counted] | None = None
    error: DsparkError | None = None


class RowsProcess:
    """A process that reads sources, with ``processes`` copies of ``maker`` in processes below
    it.
    """

    def __init__(self, maker: SampleMaker, processes: int) -> None:
        # As bytes: the process itself only hands the maker on, and its imports take seconds.
        given = pickled(maker, "tokenises rows"), processes
        self._pool = WorkerPool(1, "reads rows", _begin, given, workers=processes)

    def reader(self, readers: Sequence[PartReader]) -> SourcesReader:
        """Return a reader that reads the sources of ``readers`` in the process; they note dropped
        rows, and have the counts at the end.
        """
        return _Elsewhere(readers, self._pool)

    def wait_until_started(self) -> None:
        """Wait until the process and those below it are ready."""
        self._pool.wait_until_started()

    def close(self) -> None:
        self._pool.close()


class _Elsewhere(SourcesReader):
    """``readers`` count and note, and their rows are read in ``pool``."""

    def __init__(self, readers: Sequence[PartReader], pool: WorkerPool) -> None:
        super().__init__(readers)
        self._pool = pool

    def parts(self, committed: Mapping[int, PartRecord]) -> Iterator[PartRows]:
        given = [
            {
                "corpus": r.corpus,
                "block_rows": r.block_rows,
                "limit": r.limit,
                "max_dropped": r.max_dropped,
                "source": r.source,
                "takes": r.takes,
            }
            for r in self.readers
        ]
        waiting: deque[Future[Step]] = deque([self._pool.submit(_start, given, dict(committed))])
        while True:
            while len(waiting) < PARTS:
                waiting.append(self._pool.submit(_step))
            step = waiting.popleft().result()
            for line in step.notes:
                self.readers[0].note(line)
            if step.error is not None:
                raise step.error
            if step.counted is not None:
                for reader, counted in zip(self.readers, step.counted, strict=True):
                    counted.give(reader)
                return
            if step.part is not None:
                yield step.part


# -- in the process --------------------------------------------------------------------------------


class _Reading:
    """The reading of some sources. ``given``: the arguments of each one's ``PartReader``."""

    def __init__(
        self, make: Tokenisers, given: Sequence[Any], committed: Mapping[int, PartRecord]
    ) -> None:
        self.notes: list[str] = []
        made = [PartReader(maker=None, note=self.notes.append, make=make, **r) for r in given]
        self.sources = SourcesReader(made)
        self.parts = self.sources.parts(committed)

    def step(self) -> Step:
        part = counted = failed = None
        try:
            part = next(self.parts, None)
        except DsparkError as error:
            failed = error
        if part is None and failed is None:
            counted = [Counted.by(r) for r in self.sources.readers]
        notes = self.notes.copy()
        self.notes.clear()
        return Step(notes, part, counted, failed)


_make: Tokenisers | None = None
_reading: _Reading | None = None


def _begin(maker: bytes, processes: int) -> None:
    global _make
    _make = Tokenisers(maker, processes)
    # At exit a process closes its queues and waits for its children, which end only when told to by
    # one of these: so before both.
    Finalize(None, _make.end, exitpriority=100)
    try:
        _make.wait_until_started()
    except EngineError:  # the dump hears of it as this process ends, and prints no trace
        logging.getLogger("concurrent.futures").disabled = True
        raise


def _start(given: Sequence[Any], committed: Mapping[int, PartRecord]) -> Step:
    global _reading
    assert _make is not None
    _reading = _Reading(_make, given, committed)
    return Step([])


def _step() -> Step:
    assert _reading is not None
    return _reading.step()
