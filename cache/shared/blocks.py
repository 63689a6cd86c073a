"""Memory that is used again and again and that a worker process can map: a dump assembles and
compresses parts in it, the readers of a training write rows to it.

A fresh allocation per part would be faulted in page by page every time, which cost as much as
compressing it (docs/log/2026-11-22-where-the-time-went.md); a block is reused. If worker processes
write, it is a file in memory (``memfd``), so that nothing is copied or pickled between processes,
``/dev/shm`` with its small limit in containers is not needed, and the kernel frees it whichever
process is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
ALIGN = 64  # bytes
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE (Linux 5.14)
POPULATE_BYTES = 16 << 20  # at once; in between, other threads may map memory
log = logging.getLogger("dspark.cache")


@dataclass(frozen=True, slots=True)
class Region:
    """The place of one array in a block: ``offset`` in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class Handle(NamedTuple):
    """A block as another process finds it: descriptor ``fd`` of process ``pid``, ``size`` bytes. A
    plain tuple, which is sent in a fifth of the time: the training's loop sends one per row.
    """

    pid: int
    fd: int
    size: int


def can_share() -> bool:
    """Tell whether this system has what ``SharedBlock(shared=True)`` needs (Linux)."""
    return hasattr(os, "memfd_create")


def with_slack(size: int) -> int:
    """Return the bytes that a block takes for ``size``. Parts and rows differ a little in size, and
    pages would be mapped and locked again each time.
    """
    return size + size // 8


class SharedBlock:
    """A block of at least as many bytes as were ever reserved. ``shared``: worker processes may map
    it; the system's lists of open files call it ``name``.
    """

    def __init__(self, shared: bool, name: str = "dspark-part") -> None:
        self._fd = os.memfd_create(name) if shared else -1
        self._memory: Array = np.empty(0, np.uint8)
        self._pinned = self._tried = False
        self._fresh = 0  # bytes whose pages may be missing

    @property
    def size(self) -> int:
        """Bytes that can be used."""
        return self._memory.shape[0]

    @property
    def pinned(self) -> bool:
        """Tell whether CUDA has locked the pages."""
        return self._pinned

    def reserve(self, size: int, *, slack: bool = True) -> None:
        """Make room for ``size`` bytes; earlier contents may be lost. ``slack``: and for a little
        more, as later sizes may differ.
        """
        if size <= self._memory.shape[0]:
            return
        self._fresh = size
        size = with_slack(size) if slack else size
        self._unpin()
        if self._fd < 0:
            self._memory = np.empty(size, np.uint8)
            return
        os.ftruncate(self._fd, size)
        self._memory = np.frombuffer(mmap.mmap(self._fd, size), np.uint8)

    def follow(self, size: int) -> None:
        """Map again what a worker process has enlarged to ``size`` bytes (``enlarged``)."""
        self._unpin()
        self._memory = np.frombuffer(mmap.mmap(self._fd, size), np.uint8)

    def array(self, region: Region) -> Array:
        """Return the array at ``region``, writable, without a copy."""
        return view(self._memory, region)

    def populate(self) -> None:
        """Make the pages of newly reserved memory present, without Python's lock; does nothing for
        memory that was populated before.
        """
        fresh, self._fresh = self._memory[: self._fresh], 0
        populate(fresh)

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
                "%d bytes could not be page-locked (CUDA error %d; ulimit -l?): copies from "
                "and to the GPU will be slower",
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


def mapped(handle: Handle) -> Array:
    """Map a block of another process of this user: uint8, writable. Raises OSError if that process
    has ended or has closed it.
    """
    with _opened(handle) as fd:
        return np.frombuffer(mmap.mmap(fd, handle.size), np.uint8)


def enlarged(handle: Handle, size: int) -> Handle:
    """Make room for ``size`` bytes in a block of another process, which then has to ``follow``."""
    size = with_slack(size)
    with _opened(handle) as fd:
        os.ftruncate(fd, size)
    return handle._replace(size=size)


@contextlib.contextmanager
def _opened(handle: Handle) -> Iterator[int]:
    fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR)
    try:
        # Once a block is closed, its number may be that of any file.
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:dspark-"):
            raise OSError(f"file {handle.fd} of process {handle.pid} is not a block any more")
        yield fd
    finally:
        os.close(fd)


def populate(memory: Array) -> None:
    """Make the pages of ``memory`` present, a few megabytes at a time and without Python's lock.

    A copy into missing pages faults them in one by one, at a tenth of its speed. A kernel that
    cannot do this leaves it so.
    """
    begin = memory.ctypes.data
    end, page = begin + memory.shape[0], mmap.PAGESIZE
    for start in range(begin - begin % page, end, POPULATE_BYTES):
        length = min(POPULATE_BYTES, end - start)
        if _madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), POPULATE_WRITE):
            return


_madvise: Any = getattr(ctypes.CDLL(None), "madvise", lambda *a: -1)


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


def view(memory: Array, region: Region) -> Array:
    """Return the array at ``region`` of ``memory`` uint8, without a copy."""
    return np.ndarray(region.shape, region.dtype, buffer=memory.data, offset=region.offset)
