"""Where a store's objects are: one small interface with two implementations, local folders and
object stores.

An object is named by its path within the store, with slashes
(``parts/000000000001/aux_code/c/0/0/0``). A local folder commits a part by renaming a finished
folder; an object store writes the part's objects first and its record last. Readers need not know
which: a part with a record is complete.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from dspark.cache.errors import DamagedCacheError, read_error
from dspark.cache.files.atomic import STAGING, existing_parent, remove, staged, write_file
from dspark.cache.files.block_cache import BLOCK
from dspark.cache.files.urls import Url, Where, where

S = TypeVar("S")
T = TypeVar("T")
AT_ONCE = 16  # requests of one process
# A file of another file system, too many names, a file system without hard links, or a file of
# another user.
NO_LINK = frozenset({errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM})

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class Object(Protocol):
    """An object opened for reading. ``size`` in bytes; ``read`` may be called from several
    threads.
    """

    @property
    def size(self) -> int: ...
    def read(self, start: int, length: int) -> Bytes:
        """Read bytes ``[start, start + length)``, fewer if the object ends earlier."""
        ...

    def view(self) -> Bytes:
        """Return all of it, without a copy if possible."""
        ...

    def forget(self) -> bool:
        """Delete what is kept of it on this machine; tell whether anything was."""
        ...


class Place(Protocol):
    """A store's objects. Errors are OSError. ``remote``: each call is a slow request."""

    @property
    def remote(self) -> bool: ...
    def where(self, name: str) -> Where:
        """Return how to name an object in a message; without a name, the store."""
        ...

    def open(self, name: str, size: int | None = None, version: str = "") -> Object:
        """Open an object. ``size``: its bytes, if known. ``version``: identifies its content, so
        that pieces of it may be cached locally.
        """
        ...

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Read all of an object. Raises ValueError, without reading, if it has more than ``limit``
        bytes.
        """
        ...

    def size(self, name: str) -> int: ...
    def exists(self, name: str = "") -> bool:
        """Tell whether an object exists; without a name, whether the store has any."""
        ...

    def sizes(self, name: str) -> dict[str, int]:
        """Return the bytes of every object below ``name``, by relative path."""
        ...

    def list(self, name: str) -> list[str]:
        """Return the names directly below ``name``, sorted, without uncommitted ones."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replace a small object, completely or not at all."""
        ...

    def link(self, other: Place, source: str, name: str) -> None:
        """Make ``name`` the object ``source`` of ``other``, if possible without its bytes passing
        through here.
        """
        ...

    def replace(self, name: str) -> AbstractContextManager[Path]:
        """As ``commit``, for a group that may exist: the new one replaces it."""
        ...

    def remove(self, name: str) -> None:
        """Delete every object below ``name``, or the object of that name, if it exists."""
        ...

    def local(self, name: str) -> AbstractContextManager[Path]:
        """Return a local folder, named like the last part of ``name``, with the objects below it;
        do not change it.
        """
        ...

    def local_file(self, name: str) -> AbstractContextManager[Path]:
        """Return a local file with an object's content; do not change it."""
        ...

    def kept(self, name: str, version: str) -> Path:
        """As ``local``, for as long as the process runs. ``version`` identifies the content."""
        ...

    def free(self) -> int | None:
        """Return the free space in bytes; None if unknown."""
        ...

    def commit(self, name: str, token: str) -> AbstractContextManager[Path]:
        """Yield a local folder whose files become the objects below ``name`` when the block ends,
        all or none; none if another writer has made them. ``token`` tells writers apart.
        """
        ...


class LocalFile:
    """A file, closed when the last reference to it is dropped."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)

    # ``os`` may be unloaded when Python exits
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "_file"):
            close(self._file)

    @property
    def size(self) -> int:
        return os.fstat(self._file).st_size

    def read(self, start: int, length: int) -> Bytes:
        return np.frombuffer(os.pread(self._file, length, start), np.uint8)

    def view(self) -> Bytes:
        mapped: Any = mmap.mmap(self._file, 0, prot=mmap.PROT_READ)
        return np.frombuffer(mapped, np.uint8)

    def forget(self) -> bool:
        return False


def in_parallel(work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Do ``work`` for each item, ``AT_ONCE`` at a time; results in order."""
    if len(items) < 2:
        return [work(i) for i in items]
    with ThreadPoolExecutor(min(AT_ONCE, len(items)), thread_name_prefix="dspark-remote") as pool:
        return list(pool.map(work, items))


def each_in_parallel(*places: Place) -> Callable[[Callable[[S], T], Sequence[S]], list[T]]:
    """Use ``in_parallel`` if each piece of work is a request to one of ``places``, else one after
    another.
    """
    if any(place.remote for place in places):
        return in_parallel
    return lambda work, items: [work(i) for i in items]


def ends(file: Object, head: int, tail: int) -> tuple[Bytes, Bytes]:
    """Read the first ``head`` and the last ``tail`` bytes of a remote object: as one request if it
    is small, else at the same time.
    """
    size = file.size
    if size <= BLOCK:
        whole = file.read(0, size)
        return whole[:head], whole[max(0, size - tail) :]
    spans = [(0, head), (size - tail, tail)]
    first, last = in_parallel(lambda span: file.read(*span), spans)
    return first, last


def refuse_larger(size: int, limit: int) -> None:
    """Raise ValueError for an object of ``size`` bytes that is to be read completely but exceeds
    ``limit``.
    """
    if size > limit:
        raise ValueError(f"{size:,} bytes, more than any valid file has")


class Memory:
    """An object held in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self.size = len(data)

    def read(self, start: int, length: int) -> Bytes:
        return self._data[start : start + length]

    def view(self) -> Bytes:
        return self._data

    def forget(self) -> bool:
        return False


def place_of(store: str | Where) -> Place:
    """Return the place of the store at a path or URL. Raises UsageError for an unsupported URL."""
    found = where(store)
    if isinstance(found, Url):
        from dspark.cache.files.bucket import Bucket

        return Bucket(found)
    return Folder(found)


class Folder:
    """A store in a local folder."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def where(self, name: str) -> Path:
        return self.root / name

    def open(self, name: str, size: int | None = None, version: str = "") -> LocalFile:
        return LocalFile(self.root / name)

    def exists(self, name: str = "") -> bool:
        return (self.root / name).exists()

    def sizes(self, name: str) -> dict[str, int]:
        top = self.root / name
        return {
            p.relative_to(top).as_posix(): p.stat().st_size for p in top.rglob("*") if p.is_file()
        }

    def replace(self, name: str) -> AbstractContextManager[Path]:
        return staged(self.root / name, replace=True)

    def remove(self, name: str) -> None:
        remove(self.root / name)

    def local(self, name: str) -> AbstractContextManager[Path]:
        return nullcontext(self.root / name)

    def local_file(self, name: str) -> AbstractContextManager[Path]:
        return nullcontext(self.root / name)

    def kept(self, name: str, version: str) -> Path:
        return self.root / name

    def free(self) -> int | None:
        return shutil.disk_usage(existing_parent(self.root)).free

    def read(self, name: str, limit: int | None = None) -> bytes:
        if limit is not None:
            refuse_larger(self.size(name), limit)
        return (self.root / name).read_bytes()

    def size(self, name: str) -> int:
        return os.stat(self.root / name).st_size

    def list(self, name: str) -> list[str]:
        return sorted(
            p.name for p in (self.root / name).iterdir() if not p.name.startswith(STAGING)
        )

    def write(self, name: str, data: bytes) -> None:
        write_file(self.root / name, data)

    def link(self, other: Place, source: str, name: str) -> None:
        to = self.root / name
        to.parent.mkdir(parents=True, exist_ok=True)
        with other.local_file(source) as path:
            try:
                if other.remote:  # a file that is deleted again
                    shutil.copyfile(path, to)
                else:
                    os.link(path, to)
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                shutil.copyfile(path, to)

    def commit(self, name: str, token: str) -> AbstractContextManager[Path]:
        return staged(self.root / name, keep=True, token=token)


def refuse_links(store: Path) -> None:
    """Raise DamagedCacheError if anything within ``store`` is a link: deleting or reading would
    follow it out of the store. The store's own path may be a link.
    """

    def fail(error: OSError) -> None:
        raise read_error(Path(error.filename or store), error) from error

    for folder, folders, files in os.walk(store, onerror=fail):
        for name in (*folders, *files):
            if os.path.islink(path := Path(folder) / name):
                raise DamagedCacheError(
                    f"{path}: a link to {os.readlink(path)}. A store contains no links: replace "
                    "it with what it points to."
                )
