"""Memory that readers write rows to, made and page-locked once.

A row that comes in memory of its own costs the loop's process a map and an unmap of tens of MB with
Python's lock held, a copy to page-locked memory in a thread of its own, and every reader new pages:
12 ms per row on an H100 (docs/log/2026-11-26-streamed-step.md). A slot is used again and again. The
loop lends one with each row that it asks for; the reader writes the row there and sends only where
its arrays are. The slot is free again once no tensor in the loop's process shares its memory and
its copy to the GPU is done.

Slots are made for the largest row that is expected. For a larger one the reader enlarges its slot,
and the loop maps and page-locks that again (``Slots.enlarged``).
"""

from __future__ import annotations

import contextlib
import logging
import resource
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dspark.cache.errors import TrainError, UsageError
from dspark.cache.shared.blocks import (
    Array,
    Handle,
    Region,
    SharedBlock,
    enlarged,
    mapped,
    populate,
    with_slack,
)
from dspark.cache.shared.host_memory import available

log = logging.getLogger("dspark.train")


class Offer(NamedTuple):
    """A slot as a reader is told of it. ``wish``: bytes that it should have if it is enlarged."""

    number: int
    handle: Handle
    wish: int


class Slot:
    """The memory of one row. ``copied``: an event on the device after the last copy from it."""

    def __init__(self, size: int) -> None:
        self.block = SharedBlock(shared=True, name="dspark-row")
        try:
            self.block.reserve(size)
        except OSError:
            self.block.close()
            raise
        self.locked: Future[None] | None = None
        self.copied: Any = None

    def sent(self, device: torch.device) -> None:
        """Note that a copy of the slot has been queued on the current stream of ``device``."""
        if device.type == "cuda":
            self.copied = torch.cuda.current_stream(device).record_event()


class Slots:
    """The loop's side. ``count`` slots of ``size`` bytes, and more if more rows are held at a time.
    ``pin``: page-lock them for the current CUDA device, in a thread, as readers take seconds to
    start. Memory that cannot be locked is reported and used as it is.
    """

    def __init__(self, size: int, count: int, pin: bool) -> None:
        """Raises UsageError if the host has less memory than the slots need."""
        _check_memory(size, count)
        _allow_files(2 * count)
        self._size, self._pin = max(size, 1), pin
        self._slots: list[Slot] = []
        self._returned: deque[int] = deque()  # no longer used here; a copy may still be running
        self._locker: ThreadPoolExecutor | None = None
        if pin:
            # A thread's device is the first one until it is set.
            device = torch.cuda.current_device()
            self._locker = ThreadPoolExecutor(1, "page-lock", torch.cuda.set_device, (device,))
        self.close = weakref.finalize(self, _close, self._slots, self._locker)
        self.close.atexit = False  # the system frees all of it
        self.made = self.enlarged = 0
        self._free = [self._add() for _ in range(count)][::-1]

    def lend(self) -> Offer:
        """Return a slot that nobody uses."""
        for _ in range(len(self._returned)):
            number = self._returned.popleft()
            copied = self._slots[number].copied
            done = copied is None or copied.query()
            (self._free if done else self._returned).append(number)
        number = self._free.pop() if self._free else self._add()
        return Offer(number, self._slots[number].block.handle(), self._size)

    def taken(self, number: int, size: int, used: int) -> tuple[Tensor, Slot]:
        """Return the first ``used`` bytes of a slot that a reader has written to, uint8[used];
        ``size``: what the slot has now. It is free again once the last tensor that shares this
        memory is gone and its copies are done.
        """
        slot = self._slots[number]
        if slot.locked is not None:
            slot.locked.result()
            slot.locked = None
        if size != slot.block.size:
            self.enlarged += 1
            self._size = max(self._size, used)
            with _telling_of(used):
                slot.block.follow(size)
            log.info(
                "a row takes %s, more than its slot had; enlarged to %s (%d times so far)",
                _gb(used),
                _gb(size),
                self.enlarged,
            )
            if self._pin:
                slot.block.pin()
        slot.copied = None
        window = slot.block.array(Region(0, (used,), "uint8")).data  # a view of this row alone
        weakref.finalize(window, self._returned.append, number).atexit = False
        return torch.frombuffer(window, dtype=torch.uint8), slot

    def _add(self) -> int:
        with _telling_of(self._size, len(self._slots) + 1):
            slot = Slot(self._size)
        if self._locker is not None:
            slot.locked = self._locker.submit(self._lock, slot.block)
        self._slots.append(slot)
        self.made = len(self._slots)
        return self.made - 1

    def _lock(self, block: SharedBlock) -> None:
        if self._pin:
            block.pin()
            self._pin = block.pinned  # said once


class Desk:
    """A reader's side: each slot is mapped once."""

    def __init__(self) -> None:
        self._mapped: dict[int, Array] = {}

    def memory(self, handle: Handle) -> Array:
        found = self._mapped.get(handle.fd)
        if found is None or found.shape[0] != handle.size:  # new, or larger by now
            found = self._mapped[handle.fd] = mapped(handle)
            populate(found)
        return found


class Room:
    """Memory for one row, in a slot or, without an ``offer``, of its own: called once, with the
    bytes that the row needs.
    """

    def __init__(self, desk: Desk | None = None, offer: Offer | None = None) -> None:
        self._desk, self._offer = desk, offer
        self.size = 0  # of the slot now

    def __call__(self, used: int) -> Tensor:
        """Return uint8[used], whatever is in it. Raises TrainError if the system gives none."""
        if self._desk is None or self._offer is None:
            return torch.empty(used, dtype=torch.uint8)
        handle = self._offer.handle
        with _telling_of(used):
            if used > handle.size:
                handle = enlarged(handle, max(used, self._offer.wish))
            self.size = handle.size
            return torch.from_numpy(self._desk.memory(handle)[:used])


@contextlib.contextmanager
def _telling_of(size: int, rows: int = 1) -> Iterator[None]:
    """Raise TrainError for an error of the system: ``rows`` of ``size`` bytes were to be shared."""
    try:
        yield
    except OSError as error:
        raise TrainError(
            f"no memory that reading processes can share ({error}), for {rows} "
            f"row{'s' * (rows > 1)} of {_gb(size)}. Use fewer --workers (0 for none) or a shorter "
            "--total-seq-len, or raise the limit on open files (ulimit -n)."
        ) from error


def _close(slots: list[Slot], locker: ThreadPoolExecutor | None) -> None:
    """Give the memory back, each slot's once no tensor shares it; copies from it are waited for."""
    if locker is not None:
        locker.shutdown(cancel_futures=True)
    for slot in slots:
        # A device that has failed has said so where it was used.
        with contextlib.suppress(RuntimeError):
            if slot.copied is not None:
                slot.copied.synchronize()
        slot.block.close()
    slots.clear()


def _check_memory(size: int, count: int) -> None:
    need, there = with_slack(size) * count, available()
    if there is not None and need > there:
        raise UsageError(
            f"the rows read ahead need {_gb(need)} of host memory ({count} of {_gb(size)}), but "
            f"{_gb(there)} are available. Use fewer --workers (0 for none) or a shorter "
            "--total-seq-len."
        )


def _allow_files(more: int) -> None:
    """Raise this process's and its readers' own limit on open files, as far as the system allows: a
    slot is one, and its map another.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + more
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f} GB"
