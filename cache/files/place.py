"""Where a store's objects are: one small interface, so that an object store is a second implementation.

An object is named by its path within the store, with slashes (``parts/000000000001/aux_code/c/0/0/0``). A local folder commits a part by renaming a finished
folder; an object store writes the part's objects first and its record last. Readers need not know which: a part whose record is there is whole.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dspark.cache.errors import DamagedCacheError, read_error
from dspark.cache.files.atomic import STAGING, staged, write_file

# A file of another file system, too many names, a file system without hard links, or a file of another user.
NO_LINK = frozenset({errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM})

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class Object(Protocol):
    """An object opened for reading. ``size`` in bytes; ``read`` may be called from several threads."""

    @property
    def size(self) -> int: ...
    def read(self, start: int, length: int) -> Bytes:
        """Bytes ``[start, start + length)``, fewer where the object ends before."""
        ...

    def view(self) -> Bytes:
        """All of it, without a copy if there is a way."""
        ...


class Place(Protocol):
    """A store's objects. Errors are OSError."""

    def open(self, name: str) -> Object: ...
    def read(self, name: str) -> bytes: ...
    def size(self, name: str) -> int: ...
    def list(self, name: str) -> list[str]:
        """Names directly below ``name``, sorted, without what was never committed."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replace a small object, whole or not at all."""
        ...

    def link(self, other: Place, source: str, name: str) -> None:
        """Make ``name`` the object ``source`` of ``other``, without its bytes passing through here where that can be."""
        ...

    def commit(self, name: str, token: str) -> AbstractContextManager[Path]:
        """A local folder whose files become the objects below ``name`` when the block ends, all or none; none where
        another writer has made them. ``token`` tells writers apart."""
        ...


class LocalFile:
    """A file, closed when the last reference to it goes."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)

    def __del__(
        self, close: Callable[[int], None] = os.close
    ) -> None:  # at the interpreter's end ``os`` may be gone
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


class Folder:
    """A store in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.root / name)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def size(self, name: str) -> int:
        return os.stat(self.root / name).st_size

    def list(self, name: str) -> list[str]:
        return sorted(p.name for p in (self.root / name).iterdir() if not p.name.startswith(STAGING))

    def write(self, name: str, data: bytes) -> None:
        write_file(self.root / name, data)

    def link(self, other: Place, source: str, name: str) -> None:
        assert isinstance(other, Folder)
        to = self.root / name
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(other.root / source, to)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            shutil.copyfile(other.root / source, to)

    def commit(self, name: str, token: str) -> AbstractContextManager[Path]:
        return staged(self.root / name, keep=True, token=token)


def refuse_links(store: Path) -> None:
    """Raise DamagedCacheError where something within ``store`` is a link: deleting or reading would follow it out of the store, whose own path may be one."""

    def fail(error: OSError) -> None:
        raise read_error(Path(error.filename or store), error) from error

    for folder, folders, files in os.walk(store, onerror=fail):
        for name in (*folders, *files):
            if os.path.islink(path := Path(folder) / name):
                raise DamagedCacheError(
                    f"{path}: a link to {os.readlink(path)}. Within a store there are none: put what it leads to in its place."
                )
