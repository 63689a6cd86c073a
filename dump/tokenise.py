"""Rows -> samples in processes of their own, in the order of the rows.

Rendering and tokenising a chat takes about 0.9 ms (SmolLM2's tokenizer, 270 tokens a row), most of it under Python's lock, so one process gives
at most 290,000 tokens a second and takes that time from the thread that launches the target's kernels. A small target on a large GPU is faster than that.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DsparkError

if TYPE_CHECKING:
    from dspark.dump.corpus import Row
    from dspark.dump.tokens import Made, SampleMaker

CHUNK = 64  # rows to a task
AHEAD = 3  # tasks in work or waiting, a process


def default_workers(device: str) -> int:
    """Worker processes to a stage: with a GPU a quarter of the cores, at most 8; none on a CPU, which the target needs itself."""
    return max(1, min(8, (os.cpu_count() or 1) // 4)) if device == "cuda" else 0


def worker_pool(
    processes: int, start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """Fresh processes (CUDA does not survive a fork) that leave Ctrl-C to us and end when we do, however we end; all are started now."""
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(start, arguments),
    )
    for _ in range(processes):
        pool.submit(os.getpid)
    return pool


def _begin(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if start is not None:
        start(*arguments)


class Tokenisers:
    """``processes`` copies of ``maker`` at work on rows."""

    def __init__(self, maker: SampleMaker, processes: int) -> None:
        self._ahead = AHEAD * processes
        self._pool = worker_pool(processes, _hold, (maker,))
        self._started = self._pool.submit(os.getpid)

    def __call__(self, rows: Iterator[Row]) -> Iterator[tuple[Row, Made]]:
        """Each row with what ``SampleMaker.make`` gives for it. An error, also one of ``rows`` itself, comes at its row's turn."""
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
        """Until the first of them can work: starting takes seconds, and a rate is not to be judged by them."""
        self._started.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


_maker: SampleMaker | None = None


def _hold(maker: SampleMaker) -> None:
    global _maker
    _maker = maker


def _make(rows: list[Row]) -> list[Made | DsparkError]:
    """Up to and including the first row that is an error."""
    assert _maker is not None
    out: list[Made | DsparkError] = []
    for row in rows:
        try:
            out.append(_maker.make(row))
        except DsparkError as error:
            out.append(error)
            break
    return out
