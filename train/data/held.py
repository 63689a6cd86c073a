"""The held-out rows of a training, read once and kept in host memory.

Every validation judges the same rows. Reading one takes a processor as long as a GPU takes for
eight steps (0.23 s of 16,384 tokens at SmolLM2's size), with nothing for the GPU to do. So two
processes of their own read them while the training runs, and validations find them in memory.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from multiprocessing.process import BaseProcess
from threading import Thread

from dspark.cache.shared.host_memory import available
from dspark.train.data.row import PackedRow
from dspark.train.data.stream import VALIDATION_EPOCH, Stream

log = logging.getLogger("dspark.train")
READERS, ROWS_OF_ONE = 2, 4  # processes, and the rows that one is started for at least
GRACE = 2.0  # seconds in which the thread that takes the rows finds that none comes any more
SHARE = 0.5  # of the host memory that is left, at most, for all processes of a host together


class HeldOut:
    """This rank's rows of each step of a validation, as ``Stream.steps_from`` gives them, to be
    iterated over again and again; a context manager.

    ``workers``: the readers of the training; with none, the first iteration reads the rows. Rows
    that would take more than half of the host memory that is left, or of this process's share where
    ``local`` of them are on a host, are read again each time, by this process. What reading raised
    is raised by ``fetch`` and by the iteration.
    """

    def __init__(
        self, stream: Stream, *, rank: int = 0, world: int = 1, local: int = 1, workers: int = 0
    ) -> None:
        self._read = partial(stream.steps_from, VALIDATION_EPOCH, rank=rank, world=world)
        count, size = rows_of(stream, rank, world), kept_bytes(stream, rank, world)
        readers = min(READERS, workers, count // ROWS_OF_ONE)
        if readers:
            size += stream.need(VALIDATION_EPOCH, world).host(readers)
        free = available()
        self.kept = free is None or size * local <= SHARE * free
        self._steps: list[list[PackedRow]] | None = None
        self._coming: Future[list[list[PackedRow]]] | None = None
        self._thread: Thread | None = None
        self._readers: list[BaseProcess] = []
        if not self.kept:
            log.info(
                "%d held-out rows take %.2f GB, in each of %d processes here: more than half of "
                "the %.2f GB of host memory that are left. Every validation reads them again",
                count,
                size / 1e9,
                local,
                (free or 0) / 1e9,
            )
        elif readers:
            self._coming = Future()
            others = set(multiprocessing.active_children())
            steps = self._read(workers=readers)
            self._readers = [p for p in multiprocessing.active_children() if p not in others]
            self._thread = Thread(
                target=self._receive, args=(steps, self._coming), name="dspark-held", daemon=True
            )
            self._thread.start()

    def __enter__(self) -> HeldOut:
        return self

    def __exit__(self, *error: object) -> None:
        """End the readers and let go of the rows."""
        for reader in self._readers:
            reader.kill()
        if self._thread is not None:
            self._thread.join(GRACE)
        self._readers = []
        self._steps = self._coming = None

    def fetch(self) -> None:
        """Wait until the rows are in memory, if they are to be kept."""
        if not self.kept:
            return
        if self._coming is not None:
            self._steps, self._coming = self._coming.result(), None
        if self._steps is None:
            self._steps = list(self._read())

    def __iter__(self) -> Iterator[list[PackedRow]]:
        self.fetch()
        return self._read() if self._steps is None else iter(self._steps)

    def _receive(
        self, steps: Iterator[list[PackedRow]], coming: Future[list[list[PackedRow]]]
    ) -> None:
        found = []
        try:
            for step in steps:
                found.append([row.own() for row in step])
                del step  # or its memory would not be lent again
        except Exception as error:
            coming.set_exception(error)
        else:
            coming.set_result(found)


def rows_of(stream: Stream, rank: int, world: int) -> int:
    """Return how many held-out rows a rank has."""
    steps = stream.schedule(VALIDATION_EPOCH, 0, rank, world, endless=False)
    return sum(map(len, steps))


def kept_bytes(stream: Stream, rank: int, world: int) -> int:
    """Return the bytes of host memory that a rank's held-out rows take, about."""
    return rows_of(stream, rank, world) * stream.need(VALIDATION_EPOCH, world).row
