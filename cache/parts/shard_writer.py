"""Write one array as a Zarr v3 shard file, chunk by chunk, on a pool of threads.

Zarr's own writer spends most of its time in Python between chunks, and a dump would wait for it.
``shard`` says what such a file holds.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from dspark.cache.files.atomic import start_writeback
from dspark.cache.files.checksum import crc32, crc32c
from dspark.cache.files.layout import StoredArray
from dspark.cache.parts.chunks import chunk_rows, compressor, row_bytes
from dspark.cache.records import Array
from dspark.cache.shared.host_cores import cores

T = TypeVar("T")

RUN_BYTES = 1 << 20  # of values that one thread packs before it takes more
WRITEBACK_BYTES = 16 << 20
IOV = 512  # buffers of one write; the system's limit is 1,024 or more

_processes = 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="dspark-shard")


@cache
def _threads() -> int:
    return max(1, cores() // _processes)


def share_cores(processes: int) -> None:
    """Compress with this process's share of the cores, one of ``processes`` like it, from now on.
    More threads only wait for Python's lock.
    """
    global _processes
    if processes == _processes:
        return
    _processes = processes
    _threads.cache_clear()
    _pool.cache_clear()


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of its parent's threads


class Pieces:
    """Arrays concatenated along their first axis without joining them all: a slice joins only what
    it covers. So a part that is being committed is in memory once, not twice.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([a.shape[0] for a in arrays])
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])
        self.dtype = arrays[0].dtype

    def __getitem__(self, span: slice) -> Array:
        start, stop, _ = span.indices(self.shape[0])
        first, last = np.searchsorted(self._ends, (start, max(start, stop - 1)), side="right")
        out = []
        for i in range(int(first), min(int(last), len(self._arrays) - 1) + 1):
            base = int(self._ends[i]) - self._arrays[i].shape[0]
            out.append(self._arrays[i][max(start - base, 0) : stop - base])
        return np.concatenate(out)


def write_shard(
    path: Path,
    spec: StoredArray,
    data: Array | Pieces,
    tag: bytes = b"",
    *,
    to_disk: bool = False,
) -> tuple[int, int, int]:
    """Write ``data`` (all of the array) as the shard file ``path``; returns what ``file_sums`` says
    of it. Compresses chunks in parallel; the bytes do not depend on that. ``to_disk``: the file
    will be fsynced, so the kernel begins with that now.

    ``tag``: bytes that the file begins with; the index counts from its start, so a reader of Zarr
    never looks at them.
    """
    sizes: list[int] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb", buffering=0) as raw:
        file = _Growing(raw.fileno(), to_disk)
        file.write([tag])
        # Written as they arrive, while the next ones are compressed.
        for chunks in coded_chunks(spec, data):
            sizes += [len(packed) + len(crc) for packed, crc in chunks]
            file.write([piece for chunk in chunks for piece in chunk])
        lengths = np.array(sizes, np.uint64)
        index = (
            np.stack([np.cumsum(lengths) - lengths + np.uint64(len(tag)), lengths], 1)
            .astype("<u8")
            .tobytes()
        )
        file.write([index, crc32c(index).to_bytes(4, "little")])
    return file.size, file.crc32c, file.crc32


def coded_chunks(spec: StoredArray, data: Array | Pieces) -> Iterator[list[tuple[bytes, bytes]]]:
    """Yield the chunks of ``data`` in order, some at a time, each as a shard file holds it: packed,
    and its checksum. They are made on the pool, a limited number ahead.
    """
    rows = chunk_rows(spec)
    codec = compressor(spec)

    def encode(start: int) -> tuple[bytes, bytes]:
        piece = np.ascontiguousarray(data[start : start + rows])
        if piece.shape[0] < rows:  # Zarr stores whole chunks: the last one is filled up with zeros
            full = np.zeros((rows, *piece.shape[1:]), piece.dtype)
            full[: piece.shape[0]] = piece
            piece = full
        if spec.columns:
            piece = np.ascontiguousarray(np.moveaxis(piece, 0, -1))
        if codec is None:
            packed = piece.tobytes()
        else:
            packed = bytes(codec.encode(piece if spec.shuffle else piece.view(np.uint8)))
        return packed, crc32c(packed).to_bytes(4, "little")

    def encode_run(start: int) -> list[tuple[bytes, bytes]]:
        return [encode(i) for i in range(start, min(start + run, data.shape[0]), rows)]

    # Handing a thread one chunk of some 60 KB takes Python as long as compressing it, so threads
    # get them by the megabyte.
    run = rows * max(1, RUN_BYTES // max(1, rows * row_bytes(spec)))
    yield from _in_order(encode_run, range(0, data.shape[0], run))


def _in_order(work: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    """Do ``work`` for all items on the pool, a limited number ahead; results in order."""
    pool, ahead, coming = _pool(), 2 * _threads(), deque[Future[T]]()
    try:
        for item in items:
            coming.append(pool.submit(work, item))
            if len(coming) > ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for left in coming:
            left.cancel()


class _Growing:
    """A file that is being written, and the size and checksums of what it has so far."""

    def __init__(self, fd: int, to_disk: bool) -> None:
        self._fd, self._to_disk = fd, to_disk
        self._begun = 0  # bytes that the kernel was told to write to disk
        self.size = self.crc32c = self.crc32 = 0

    def write(self, pieces: list[bytes]) -> None:
        """Append ``pieces``, without joining them."""
        for piece in pieces:
            self.size += len(piece)
            self.crc32c, self.crc32 = crc32c(piece, self.crc32c), crc32(piece, self.crc32)
        for i in range(0, len(pieces), IOV):
            some = pieces[i : i + IOV]
            written, size = os.writev(self._fd, some), sum(map(len, some))
            if written < size:  # a signal, or a disk that is nearly full
                rest = memoryview(b"".join(some))[written:]
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
        if self._to_disk and self.size - self._begun >= WRITEBACK_BYTES:
            start_writeback(self._fd, self._begun, self.size - self._begun)
            self._begun = self.size
