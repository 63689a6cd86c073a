"""Read rows of one array, stored as a Zarr v3 shard file.

Only the two hot operations are ours: reading some rows, and writing the shard file of a whole array
(``shard_writer``). Metadata is zarr-python's, and tests compare bytes and values with it.

Layout (Zarr v3 ``sharding_indexed``): the inner chunks one after another, each ``compress(values) +
crc32c``; then, per chunk, offset and length as two little-endian uint64; then the crc32c of that
index. Every array here has one shard and is cut along its first axis only.

Chunks of level 0 are uncompressed: all have the same length, so the file is a table of them. They
are read through a memory map, each summed in place and then copied into the result. In this order
the sum is what fetches the chunk from memory, for it only reads (25 GB/s on one core of an EPYC),
and the copy finds it in the processor's cache: 1.2 to 1.3 times a plain copy; copying first and
summing the copy takes 1.3 to 1.4, ``pread`` into the same place 2
(docs/log/2026-11-22-read-at-memory-speed.md). A committed part is never changed or truncated, so
what was summed is what is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dspark.cache.errors import DamagedCacheError, read_error
from dspark.cache.files.checksum import crc32c
from dspark.cache.files.layout import StoredArray
from dspark.cache.files.place import LocalFile, Object, ends
from dspark.cache.files.urls import Where
from dspark.cache.parts.chunks import (
    blosc_size,
    check_claim,
    chunk_rows,
    compressor,
    row_bytes,
    zstd_size,
)
from dspark.cache.records import Array

T = TypeVar("T")

# the crc32c of any bytes followed by their own crc32c, little-endian, and of no others
RESIDUE = 0x48674BC7


class Shard:
    """An open shard file for reading rows. Thread-safe: reads are positional, nothing is shared but
    the index.
    """

    def __init__(
        self,
        path: Where,
        spec: StoredArray,
        tag: bytes = b"",
        file: Callable[[], Object] | None = None,
    ) -> None:
        """``tag``: what the file must begin with. ``file`` opens it if it is not the local file
        ``path``.
        """
        self.path, self.spec = path, spec
        self.rows = chunk_rows(spec)
        self._dtype = np.dtype(spec.dtype)
        self._row_bytes = row_bytes(spec)
        self._chunk_bytes = self.rows * self._row_bytes
        self._codec = compressor(spec)
        self._count = -(-spec.shape[0] // self.rows)
        self._start = len(tag)
        self._believed = False
        self._table: Array | None = None
        self._lock = threading.Lock()
        self._index: Array | None = None
        try:
            self._file: Object = LocalFile(Path(str(path))) if file is None else file()
        except OSError as error:
            raise read_error(path, error) from error
        self._fresh(lambda: self._open(tag, remote=file is not None))

    def _open(self, tag: bytes, *, remote: bool) -> None:
        """Check what the file begins with; of a remote one, read the index too."""
        path, raw = self.path, None
        try:
            if tag and remote and self._codec is not None:  # each read is a request
                head, raw = ends(self._file, len(tag), self._index_bytes)
            else:
                head = self._file.read(0, len(tag)) if tag else np.empty(0, np.uint8)
        except OSError as error:
            raise read_error(path, error) from error
        if (found := head.tobytes()) != tag:
            raise DamagedCacheError(
                f"{path}: begins with {found.hex()}, expected {tag.hex()}: the file belongs to "
                "another array, part or store"
            )
        self._index = None if raw is None else self._checked(raw)

    def _fresh(self, work: Callable[[], T]) -> T:
        """Do ``work``; again with what the service has now, if kept pieces were damaged."""
        try:
            return work()
        except DamagedCacheError:
            if not self._file.forget():
                raise
            self._index = self._table = None
            try:
                return work()
            except DamagedCacheError:
                self._file.forget()
                raise

    @property
    def _index_bytes(self) -> int:
        return 16 * self._count + 4

    def _checked(self, raw: Array) -> Array:
        return (
            _check(raw, self._index_bytes, f"{self.path}: shard index").view("<u8").reshape(-1, 2)
        )

    def _size(self) -> int:
        try:
            return self._file.size
        except OSError as error:
            raise read_error(self.path, error) from error

    def _bytes(self, start: int, length: int) -> Array:
        try:
            return self._file.read(start, length)
        except OSError as error:
            raise read_error(self.path, error) from error

    @property
    def index(self) -> Array:
        """Return offset and length of every chunk, uint64[chunks, 2]; read and checked once."""
        with self._lock:
            if self._index is None:
                size, end = self._index_bytes, self._size()
                raw = self._bytes(end - size, size) if end >= size else np.empty(0, np.uint8)
                self._index = self._checked(raw)
            return self._index

    @property
    def table(self) -> Array:
        """Map uncompressed chunks, uint8[chunks, bytes and their crc32c]; the file and its index
        must agree with that layout.
        """
        if self._table is None:
            length = self._chunk_bytes + 4
            expected = [[self._start + i * length, length] for i in range(self._count)]
            whole = self._size() == self._start + self._count * (length + 16) + 4
            if not whole or self.index.tolist() != expected:
                raise DamagedCacheError(
                    f"{self.path}: not {self._count} chunks of {length} bytes, one after the other"
                )
            try:
                view = self._file.view()
            except OSError as error:
                raise read_error(self.path, error) from error
            chunks = view[self._start : self._start + self._count * length]
            self._table = chunks.reshape(self._count, length)
        return self._table

    def _ranged(self, first: int, last: int) -> Array:
        """Read uncompressed chunks ``first`` to ``last``, as in ``table``, from a file that cannot
        be mapped.
        """
        length, count = self._chunk_bytes + 4, last - first + 1
        raw = self._bytes(self._start + first * length, count * length)
        if (
            len(raw) != count * length
            or self._size() != self._start + self._count * (length + 16) + 4
        ):
            raise DamagedCacheError(
                f"{self.path}: not {self._count} chunks of {length} bytes, one after the other"
            )
        return raw.reshape(count, length)

    def _read_mapped(self, start: int, stop: int, out: Array) -> None:
        """Read rows ``[start, stop)``, at least one, of uncompressed chunks into ``out``."""
        rows, row = self.rows, self._row_bytes
        first, last = start // rows, (stop - 1) // rows
        table, base = (
            (self.table, 0)
            if isinstance(self._file, LocalFile)
            else (self._ranged(first, last), first)
        )
        flat = out.view(np.uint8).reshape(-1)
        at = 0
        for i in range(first, last + 1):
            chunk = table[i - base]
            # One sum over a chunk and the crc32c behind it: looking the stored one up only to
            # compare would cost as much as a small chunk's copy.
            if crc32c(chunk) != RESIDUE:
                raise self._damaged(i, chunk)
            low = (start - i * rows) * row if i == first else 0
            high = (stop - i * rows) * row if i == last else self._chunk_bytes
            flat[at : at + high - low] = chunk[low:high]
            at += high - low

    def _damaged(self, i: int, chunk: Array) -> DamagedCacheError:
        stored, computed = int.from_bytes(chunk[-4:].tobytes(), "little"), crc32c(chunk[:-4])
        return DamagedCacheError(f"{self._where(i)}: stored crc32c {stored}, computed {computed}")

    def _where(self, chunk: int) -> str:
        start = chunk * self.rows
        return (
            f"{self.path}: chunk {chunk} (rows "
            f"{start}-{min(start + self.rows, self.spec.shape[0])})"
        )

    def read(self, start: int, stop: int) -> Array:
        """Read rows ``[start, stop)``. Their chunks are adjacent in the file, so this is one
        read.
        """
        shape, dtype = self.spec.shape, self._dtype
        assert 0 <= start <= stop <= shape[0], (start, stop, shape)
        if start == stop:
            return np.empty((0, *shape[1:]), dtype)
        return self._fresh(lambda: self._read(start, stop))

    def _read(self, start: int, stop: int) -> Array:
        shape, dtype = self.spec.shape, self._dtype
        if not self._believed:
            check_claim(self.path, max(shape[0], self.rows) * self._row_bytes, self._size())
            self._believed = True
        out = np.empty((stop - start, *shape[1:]), dtype)
        if self._codec is None:
            self._read_mapped(start, stop, out)
            return out
        first, last = start // self.rows, (stop - 1) // self.rows
        spans = self.index[first : last + 1]
        base = int(spans[0, 0])
        length = int(spans[-1, 0]) + int(spans[-1, 1]) - base
        if not 0 < length <= self._size() - base:
            raise DamagedCacheError(
                f"{self._where(first)}: the shard index places it outside the file"
            )
        raw = self._bytes(base, length)
        for i, (offset, size) in enumerate(spans.tolist(), first):
            at = offset - base
            where = self._where(i)
            packed = _check(raw[at : at + size], size, where)
            low, high = max(start, i * self.rows), min(stop, (i + 1) * self.rows)
            to = out[low - start : high - start]
            if (
                high - low == self.rows and not self.spec.columns
            ):  # the whole chunk is wanted: only the result's memory is touched
                self._decode(packed, where, to.view(np.uint8).reshape(-1))
                continue
            values = np.frombuffer(self._decode(packed, where), dtype)
            if self.spec.columns:
                values = np.moveaxis(values.reshape(*shape[1:], self.rows), -1, 0)
            else:
                values = values.reshape(self.rows, *shape[1:])
            to[...] = values[low - i * self.rows : high - i * self.rows]
        return out

    def _decode(self, packed: Array, where: str, out: Array | None = None) -> Any:
        """Decode a chunk's bytes, into ``out`` if given, which must have their size."""
        # Before anything is allocated: a few bytes can be made to claim gigabytes.
        claimed = blosc_size(packed) if self.spec.shuffle else zstd_size(packed)
        if claimed != self._chunk_bytes:
            raise DamagedCacheError(
                f"{where}: decompresses to {claimed} bytes, expected {self._chunk_bytes}"
            )
        try:
            values = self._codec.decode(packed, out)
        except Exception as error:  # blosc and zstd raise RuntimeError for invalid bytes
            raise DamagedCacheError(f"{where}: cannot be decompressed: {error}") from error
        return values


def _check(raw: Array, size: int, where: str) -> Array:
    """Return the bytes before a trailing crc32c, which they must match."""
    if len(raw) != size or size < 4:
        raise DamagedCacheError(f"{where}: found {len(raw)} bytes, expected {size}")
    stored, computed = int.from_bytes(raw[-4:].tobytes(), "little"), crc32c(raw[:-4])
    if stored != computed:
        raise DamagedCacheError(f"{where}: stored crc32c {stored}, computed {computed}")
    return raw[:-4]
