"""Memory in which a vLLM worker and we share batches of codes: the worker copies them there from
its device, and we read them there.

A file per batch needs new page-locked memory, new pages of a file and, here, new mapped pages; a
slot is used again and has its pages (docs/log/2026-11-26-host-side-of-a-dump.md). A slot is a
``SharedBlock``: its first byte says whether it holds a batch that is still needed. The worker sets
it and we clear it; nobody else writes there. The memory is freed with the two processes, however
they end.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark.cache.shared.blocks import (
    ALIGN,
    Handle,
    Region,
    SharedBlock,
    can_share,
    mapped,
    populate,
)

if TYPE_CHECKING:
    import torch

Bytes = np.ndarray[tuple[int, ...], np.dtype[Any]]

SLOT_BYTES = 1 << 30  # of all slots of a worker
MOST = 64  # slots of a worker; each is an open file
HEAD = ALIGN  # bytes before the first array


class Slot:
    """One batch's memory, of ``size`` bytes at least."""

    def __init__(self, size: int) -> None:
        self.block = SharedBlock(shared=True, name="dspark-slot")
        self.block.reserve(size)

    @property
    def lent(self) -> bool:
        return bool(self._head[0])

    def lend(self) -> None:
        self._head[0] = 1

    @property
    def _head(self) -> Bytes:
        return self.block.array(Region(0, (HEAD,), "uint8"))

    def fill(self, arrays: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Start copying ``arrays``; returns where each begins, in bytes."""
        import torch

        places, at = {}, HEAD
        for name, array in arrays.items():
            places[name] = at
            here = self.block.array(Region(at, (array.nbytes,), "uint8"))
            data = array.contiguous().view(-1).view(torch.uint8)
            torch.from_numpy(here).copy_(data, non_blocking=True)
            at += -(-array.nbytes // ALIGN) * ALIGN
        return places


class Slots:
    """The slots of a worker: of ``limit`` bytes together, made as they are needed."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = SLOT_BYTES if limit is None else limit
        self._slots: list[Slot] = []
        self._taking = threading.Lock()

    def take(self, arrays: Mapping[str, torch.Tensor]) -> Slot | None:
        """Return a slot that has room for ``arrays`` and is now lent; None if there is none, and no
        memory for another.

        A slot whose batch could not be handed over stays lent: copies into it may still be running.
        """
        size = HEAD + sum(-(-a.nbytes // ALIGN) * ALIGN for a in arrays.values())
        with self._taking:
            slot = self._with_room(size)
            if slot is None:
                return None
            slot.block.reserve(size)
            slot.lend()
        slot.block.populate()
        if any(array.is_cuda for array in arrays.values()):
            slot.block.pin()
        return slot

    def _with_room(self, size: int) -> Slot | None:
        free = sorted((s for s in self._slots if not s.lent), key=lambda s: s.block.size)
        fitting = next((s for s in free if s.block.size >= size), None)
        if fitting is not None or not can_share():
            return fitting
        used = sum(s.block.size for s in self._slots)
        grown = size + size // 8
        if used + grown <= self._limit and len(self._slots) < MOST:
            self._slots.append(Slot(size))
            return self._slots[-1]
        if free and used - free[-1].block.size + grown <= self._limit:
            return free[-1]
        return None


class SlotReader:
    """The reading side of one worker's slots; each is mapped once."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, int], Bytes] = {}

    def read(self, handle: Handle) -> torch.Tensor:
        """Return the memory of a lent slot: uint8. The slot is free again once the last tensor or
        array that shares it is gone. Raises OSError if its worker has died.
        """
        import torch

        key = handle.pid, handle.fd
        memory = self._mapped.get(key)
        if memory is None or memory.shape[0] != handle.size:  # new, or larger by now
            memory = self._mapped[key] = mapped(handle)
            populate(memory)
        window = memory.data  # a view of this batch alone
        weakref.finalize(window, _free, memory).atexit = False
        return torch.frombuffer(window, dtype=torch.uint8)


def _free(memory: Bytes) -> None:
    memory[0] = 0
