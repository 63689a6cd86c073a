"""A bounded folder of pieces of remote objects, shared by all processes of a node.

A piece is ``BLOCK`` bytes of an object in its own file, followed by a crc32c. It is written beside
and renamed, so a reader finds it complete or not at all, and needs no lock. A process that has
written much scans the folder and deletes the least recently used pieces. A piece that cannot be
kept (a full disk) is simply read again, and so are those of an object whose own checksums fail: the
object may have been damaged only while it was fetched, or have been repaired.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dspark.cache.errors import DsparkError, StoreWriteError, UsageError
from dspark.cache.files.atomic import existing_parent
from dspark.cache.files.checksum import crc32c

if TYPE_CHECKING:
    from dspark.cache.files.place import Bytes

log = logging.getLogger("dspark.cache")

BLOCK = 1 << 20
FOLDER, LIMIT = "DSPARK_CACHE_DIR", "DSPARK_CACHE_GB"  # environment variables
LARGEST = 50e9  # default bytes kept; at most half of what is free
LOOKS = 64  # a process scans the folder whenever it has written this share of the limit
LEFT = 0.9  # of the limit is left then
Fetch = Callable[[int, int], bytes]  # (start, length) of the object


class BlockCache:
    """``folder``: created when needed; ``limit``: bytes, 0 = keep nothing."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._written = 0
        self._broken = False

    @classmethod
    def of_environment(cls) -> BlockCache:
        """Make it as ``DSPARK_CACHE_DIR`` and ``DSPARK_CACHE_GB`` say. Raises UsageError."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(os.environ.get(FOLDER) or Path(base) / "dspark" / "objects")
        asked = os.environ.get(LIMIT)
        try:
            limit = None if asked is None else float(asked) * 1e9
        except ValueError:
            limit = -1.0
        if limit is not None and not 0 <= limit < 1e18:
            raise UsageError(
                f"{LIMIT}={asked}: expected gigabytes for pieces of remote stores, 0 for none."
            )
        if limit is None:
            limit = min(LARGEST, shutil.disk_usage(existing_parent(folder)).free / 2)
        return cls(folder, int(limit))

    def read(self, key: str, size: int, start: int, length: int, fetch: Fetch) -> Bytes:
        """Read bytes ``[start, start + length)`` of the object ``key`` of ``size`` bytes; adjacent
        missing pieces are fetched in one ``fetch``.
        """
        stop = min(start + length, size)
        if start >= stop:
            return np.empty(0, np.uint8)
        if not self.limit:
            return np.frombuffer(fetch(start, stop - start), np.uint8)
        first, last = start // BLOCK, (stop - 1) // BLOCK
        found: dict[int, Bytes | None] = {
            i: self._get(key, i, min(BLOCK, size - i * BLOCK)) for i in range(first, last + 1)
        }
        for low, high in _runs([i for i, data in found.items() if data is None]):
            base = low * BLOCK
            data = np.frombuffer(fetch(base, min((high + 1) * BLOCK, size) - base), np.uint8)
            for i in range(low, high + 1):
                part = data[i * BLOCK - base : (i + 1) * BLOCK - base]
                found[i] = part
                self._put(key, i, part)
        whole = [piece for i in range(first, last + 1) if (piece := found[i]) is not None]
        joined = whole[0] if len(whole) == 1 else np.concatenate(whole)
        return joined[start - first * BLOCK : stop - first * BLOCK]

    def forget(self, key: str, size: int) -> bool:
        """Delete the pieces of the object ``key`` of ``size`` bytes; tell whether there were
        any.
        """
        found = False
        for block in range(-(-size // BLOCK) if self.limit else 0):
            with suppress(OSError):
                os.unlink(self._path(key, block))
                found = True
        return found

    def _path(self, key: str, block: int) -> Path:
        name = hashlib.sha256(f"{key} {block}".encode()).hexdigest()[:40]
        return self.folder / name[:2] / name

    def _get(self, key: str, block: int, size: int) -> Bytes | None:
        path = self._path(key, block)
        try:
            raw = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        if len(raw) != size + 4 or crc32c(raw[:-4]).to_bytes(4, "little") != raw[-4:]:
            return None
        return np.frombuffer(raw, np.uint8)[:-4]

    def _put(self, key: str, block: int, data: Bytes) -> None:
        path = self._path(key, block)
        beside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                file.write(data.data)
                file.write(crc32c(data.data).to_bytes(4, "little"))
            os.replace(beside, path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            if not self._broken:
                log.warning(
                    "%s: pieces of remote stores cannot be kept there: %s", self.folder, error
                )
            self._broken = True
            return
        self._written += len(data)
        if self._written * LOOKS > self.limit:
            self._written = 0
            self.evict()

    def evict(self) -> None:
        """Delete the least recently used pieces until a tenth of the limit is free; do nothing if
        another process is doing so.
        """
        with suppress(OSError), open(self.folder / ".evict", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            if total <= self.limit:
                return
            for _, size, path in files:
                if total <= LEFT * self.limit:
                    break
                with suppress(OSError):
                    os.unlink(path)
                    total -= size

    def _files(self) -> Iterator[tuple[float, int, str]]:
        for folder in self.folder.iterdir():
            if not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(OSError):
                        stat = entry.stat()
                        yield stat.st_mtime, stat.st_size, entry.path


@contextmanager
def keeping(path: Path) -> Iterator[None]:
    """Say what to do if ``path``, a copy that must be kept on this machine, cannot be written."""
    try:
        yield
    except DsparkError:
        raise
    except OSError as error:
        raise StoreWriteError(
            f"{path}: a copy of a remote store's file could not be kept here: "
            f"{error.strerror or error}. Set {FOLDER} to a folder with free space."
        ) from error


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Yield first and last of each run of neighbours in ascending ``numbers``."""
    out: list[tuple[int, int]] = []
    for n in numbers:
        if out and out[-1][1] == n - 1:
            out[-1] = (out[-1][0], n)
        else:
            out.append((n, n))
    return out
