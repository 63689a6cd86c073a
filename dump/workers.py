"""Worker processes of a dump: how many, and how they start and end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from multiprocessing.synchronize import Barrier
from typing import Any


def default_workers(device: str) -> int:
    """Worker processes to a stage: with a GPU a quarter of the cores, at most 8; none on a CPU, which the target needs itself."""
    return max(1, min(8, (os.cpu_count() or 1) // 4)) if device == "cuda" else 0


class WorkerPool(ProcessPoolExecutor):
    """Fresh processes (CUDA does not survive a fork) that leave Ctrl-C to us and end when we do, however we end; all are started at once.

    ``start(*arguments)`` runs in each of them first.
    """

    def __init__(
        self, processes: int, start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes = processes
        # The executor starts a process only if none is idle: nobody is until all are there.
        meet = context.Barrier(processes)
        super().__init__(processes, mp_context=context, initializer=_begin, initargs=(meet, start, arguments))
        self._first = [self.submit(os.getpid) for _ in range(processes)]

    def wait_until_started(self) -> None:
        """Until all of them can work: starting takes seconds, in which they have the cores, and a rate is not to be judged by them."""
        for task in self._first:
            task.result()

    def close(self) -> None:
        """Give up what waits."""
        self.shutdown(wait=False, cancel_futures=True)


def _begin(meet: Barrier, start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if start is not None:
        start(*arguments)
    meet.wait()
