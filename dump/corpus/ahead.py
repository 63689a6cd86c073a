"""An iterator that a thread runs ahead of its consumer, so that reading rows and running the target
overlap.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def ahead(items: Iterator[T], count: int) -> Iterator[Iterator[T]]:
    """Yield ``items``, up to ``count`` of them produced ahead of the consumer. An error is raised
    at its place in the order.
    """
    made: queue.Queue[T | None] = queue.Queue(count)
    stop = threading.Event()
    failed: list[BaseException] = []

    def offer(item: T | None) -> None:
        while not stop.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in items:
                offer(item)
                if stop.is_set():
                    return
        except BaseException as error:  # re-raised in the consumer's thread
            failed.append(error)
        offer(None)

    def taken() -> Iterator[T]:
        while (item := made.get()) is not None:
            yield item
        if failed:
            raise failed[0]

    thread = threading.Thread(target=run, name="ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stop.set()
        thread.join()
