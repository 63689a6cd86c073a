"""Bring rows to the device: the next row is copied and decoded on a separate stream while the model
works on the current one.

The loop runs ahead of the GPU, by two steps at most, so the time it spends in the readers' ``next``
says nothing by itself: only a wait that began or ended with an idle GPU counts (``waited``). No
call here waits for the device otherwise. It costs the memory of one more row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

import torch

from dspark.train.data.batch import ARRAYS, Batch
from dspark.train.data.row import PackedRow

AHEAD = 2  # steps that may be queued on the GPU


class Feed:
    """Yields the steps of ``rows``, each a list of rows; ``place`` brings one to ``device``."""

    def __init__(
        self,
        rows: Iterator[list[PackedRow]],
        place: Callable[[PackedRow], Batch],
        device: torch.device,
    ) -> None:
        self._rows, self._place = rows, place
        cuda = device.type == "cuda"
        self._side: Any = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._steps: deque[Any] = deque()  # an event at the end of each step that is queued
        self._fetched: list[PackedRow] | Exception | None = None
        self._placed: tuple[PackedRow, Batch, Any] | None = None
        self.waited = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End the readers and let go of the rows: an error that is kept with its frames (a
        notebook's last one) would keep processes and page-locked memory.
        """
        self._fetched = self._placed = None
        if isinstance(self._rows, Generator):
            self._rows.close()

    def fetch(self) -> None:
        """Get the next step from the readers and start moving its first row. Call it once a step's
        work is queued. A reader error is kept for ``take``, where all ranks learn of it together.
        """
        if self._fetched is not None:
            return
        started = time.perf_counter()
        try:
            self._fetched = next(self._rows)
        except Exception as error:
            self._fetched = error
            return
        if not (self._steps and not self._steps[-1].query()):
            self.waited += time.perf_counter() - started
        self._ahead(next((row for row in self._fetched if row.slots), None))

    def take(self) -> list[PackedRow]:
        """Return the rows of the next step."""
        self.fetch()
        taken, self._fetched = self._fetched, None
        if isinstance(taken, Exception):
            raise taken
        assert taken is not None
        return taken

    def batches(self, rows: list[PackedRow]) -> Iterator[Batch]:
        """Yield ``rows`` on the device, one after another."""
        for i, row in enumerate(rows):
            if self._placed is None or self._placed[0] is not row:
                self._ahead(row)
            assert self._placed is not None
            _, batch, ready = self._placed
            self._placed = None
            self._ahead(rows[i + 1] if i + 1 < len(rows) else None)
            if ready is not None:
                _hand_over(batch, ready)
            yield batch

    def queued(self) -> None:
        """Note that all work of a step has been queued; waits until the step before the last one is
        done on the device.
        """
        if self._side is None:
            return
        self._steps.append(torch.cuda.current_stream().record_event())
        while len(self._steps) > AHEAD:
            self._steps.popleft().synchronize()

    def _ahead(self, row: PackedRow | None) -> None:
        if row is None:
            return
        if self._side is None:
            self._placed = (row, self._place(row), None)
            return
        with torch.cuda.stream(self._side):
            self._placed = (row, self._place(row), self._side.record_event())


def _hand_over(batch: Batch, ready: Any) -> None:
    """Make the model's stream wait for the copy, and tell the allocator that this stream uses the
    memory.
    """
    stream = torch.cuda.current_stream()
    stream.wait_event(ready)
    for name in ARRAYS:  # the tables share their memory with the row's other arrays
        getattr(batch, name).record_stream(stream)
