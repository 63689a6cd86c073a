"""Memory that outlives one part and that a worker process can map: states are assembled here and
compressed from here.

A fresh allocation per part would be faulted in page by page every time, which cost as much as
compressing it (docs/log/2026-11-22-where-the-time-went.md); a block is reused. If worker processes
write, it is a file in memory (``memfd``), so that nothing is copied or pickled between processes,
``/dev/shm`` with its small limit in containers is not needed, and the kernel frees it whichever
process is killed.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark.cache.files.layout import StoredArray

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
ALIGN = 64  # bytes
log = logging.getLogger("dspark.dump")


@dataclass(frozen=True, slots=True)
class Region:
    """The place of one array in a block: ``offset`` in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Handle:
    """A block as another process finds it: descriptor ``fd`` of process ``pid``, ``size`` bytes."""

    pid: int
    fd: int
    size: int


def regions(specs: Iterable[StoredArray]) -> tuple[dict[str, Region], int]:
    """Lay out the arrays ``specs`` one after another; also returns their total size in bytes."""
    out: dict[str, Region] = {}
    end = 0
    for spec in specs:
        out[spec.name] = Region(end, spec.shape, spec.dtype)
        size = int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
        end += -(-size // ALIGN) * ALIGN
    return out, end


def can_share() -> bool:
    """Tell whether this system has what ``SharedBlock(shared=True)`` needs (Linux)."""
    return hasattr(os, "memfd_create")


class SharedBlock:
    """A block of at least as many bytes as were ever reserved. ``shared``: worker processes may map
    it.
    """

    def __init__(self, shared: bool) -> None:
        self._fd = os.memfd_create("dspark-part") if shared else -1
        self._memory: Array = np.empty(0, np.uint8)
        self._pinned = self._tried = False

    def reserve(self, size: int) -> None:
        """Make room for ``size`` bytes; earlier contents may be lost."""
        if size <= self._memory.shape[0]:
            return
        # parts differ a little in size, and pages would be mapped and locked again each time
        size += size // 8
        self._unpin()
        if self._fd < 0:
            self._memory = np.empty(size, np.uint8)
            return
        os.ftruncate(self._fd, size)
        self._memory = np.frombuffer(mmap.mmap(self._fd, size), np.uint8)

    def array(self, region: Region) -> Array:
        """Return the array at ``region``, writable, without a copy."""
        return _view(self._memory, region)

    def pin(self) -> None:
        """Lock the pages for CUDA, once: a copy from the GPU then runs at bus speed instead of
        through the driver's small buffers, and the pages are present.
        """
        if self._tried or not self._memory.shape[0]:
            return
        self._tried = True
        code = int(_cuda().cudaHostRegister(self._memory.ctypes.data, self._memory.shape[0], 0))
        self._pinned = code == 0
        if not self._pinned:
            _forget_error()
            log.warning(
                "%d bytes could not be page-locked (CUDA error %d; ulimit -l?): copies from the "
                "GPU will be slower",
                self._memory.shape[0],
                code,
            )

    def _unpin(self) -> None:
        if self._pinned:
            _cuda().cudaHostUnregister(self._memory.ctypes.data)
        self._pinned = self._tried = False

    def handle(self) -> Handle:
        return Handle(os.getpid(), self._fd, self._memory.shape[0])

    def close(self) -> None:
        """Free the memory once no view of it is left."""
        self._unpin()
        # The mapping keeps the file open beside _fd, and the traceback of a failed dump's error
        # keeps this object alive.
        self._memory = np.empty(0, np.uint8)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def attach(handle: Handle, places: dict[str, Region]) -> dict[str, Array]:
    """Map the arrays of a block of the parent, in a worker process."""
    fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR)
    try:
        memory: Array = np.frombuffer(mmap.mmap(fd, handle.size), np.uint8)
    finally:
        os.close(fd)
    return {name: _view(memory, region) for name, region in places.items()}


def _cuda() -> Any:
    """The CUDA runtime that torch has loaded."""
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_error() -> None:
    """Clear CUDA's error code: CUDA keeps the code of a failed call until the next check, which
    would blame a later kernel.
    """
    import torch

    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _view(memory: Array, region: Region) -> Array:
    return np.ndarray(region.shape, region.dtype, buffer=memory.data, offset=region.offset)
