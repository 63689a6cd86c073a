"""Turn rows into samples in worker processes, in the order of the rows.

Rendering and tokenising a chat takes about 0.9 ms (SmolLM2's tokenizer, 270 tokens per row), most
of it under Python's lock, so one process yields at most 290,000 tokens per second, and takes that
time from the thread that launches the target's kernels. A small target on a large GPU is faster
than that.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from typing import TYPE_CHECKING

from dspark.cache.errors import DsparkError
from dspark.dump.workers import WorkerPool

if TYPE_CHECKING:
    from dspark.dump.corpus.masks import Made, SampleMaker
    from dspark.dump.corpus.rows import Row

CHUNK = 64  # rows per task
AHEAD = 3  # tasks running or waiting, per process


class Tokenisers:
    """``processes`` copies of ``maker`` at work on rows; it may come pickled."""

    def __init__(self, maker: SampleMaker | bytes, processes: int) -> None:
        self._ahead = AHEAD * processes
        self._pool = WorkerPool(processes, "tokenises rows", _hold, (maker,))

    def __call__(self, rows: Iterator[Row]) -> Iterator[tuple[Row, Made]]:
        """Yield each row with what ``SampleMaker.make`` returns for it. An error, including one of
        ``rows`` itself, is raised at its row's turn.
        """
        waiting: deque[tuple[list[Row], Future[list[Made | DsparkError]]]] = deque()
        failed: DsparkError | None = None
        ended = False
        while True:
            while not ended and len(waiting) < self._ahead:
                chunk: list[Row] = []
                try:
                    for row in islice(rows, CHUNK):
                        chunk.append(row)
                except DsparkError as error:
                    failed = error
                ended = failed is not None or len(chunk) < CHUNK
                if chunk:
                    waiting.append((chunk, self._pool.submit(_make, chunk)))
            if not waiting:
                break
            chunk, done = waiting.popleft()
            for row, made in zip(chunk, done.result(), strict=False):
                if isinstance(made, DsparkError):
                    raise made
                yield row, made
        if failed is not None:
            raise failed

    def wait_until_started(self) -> None:
        """Wait until all of them are ready."""
        self._pool.wait_until_started()

    def close(self) -> None:
        self._pool.close()

    def end(self) -> None:
        """Discard waiting tasks, and return when the processes have ended."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool.close()  # the file that they start from, if they never did


_maker: SampleMaker | None = None


def _hold(maker: SampleMaker | bytes) -> None:
    global _maker
    _maker = pickle.loads(maker) if isinstance(maker, bytes) else maker


def _make(rows: list[Row]) -> list[Made | DsparkError]:
    """Make samples up to and including the first row that raises."""
    assert _maker is not None
    out: list[Made | DsparkError] = []
    for row in rows:
        try:
            out.append(_maker.make(row))
        except DsparkError as error:
            out.append(error)
            break
    return out
