"""Locks as files. A file is created atomically by a hard link, which fails if the name exists, on
NFS too; a lock is replaced by a rename, by the process that created the claim file for this
replacement.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dspark.cache.errors import StoreWriteError
from dspark.cache.files.atomic import STAGING, clear_replaced
from dspark.cache.files.lock import OLD, Found, Lock, Owner, hold
from dspark.cache.files.urls import Url, Where

LOCK = ".lock"  # the name of a lock, or what it ends with
LIMIT = 1 << 16  # bytes of a lock that are looked at
# What says that a file system has no hard links.
NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class FolderLocks:
    """Locks in a folder, by their names within it. Ages are differences of the file system's own
    times, so no two clocks are compared.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self, name: str, data: bytes) -> str | None:
        path, beside = self.folder / name, self._beside(name, data)
        try:
            os.link(beside, path)
        except FileExistsError:
            # A server may have created the link but lost the response.
            return _version(data) if os.stat(beside).st_nlink == 2 else None
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise StoreWriteError(
                    f"{path}: the lock could not be made: {error.strerror}"
                ) from error
            return self._create_alone(path, data)
        finally:
            beside.unlink(missing_ok=True)
        return _version(data)

    def _create_alone(self, path: Path, data: bytes) -> str | None:
        """Create the lock without links: the file exists before its content, so a process that dies
        in between leaves a lock without a holder.
        """
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        with os.fdopen(file, "wb") as to:
            to.write(data)
        return _version(data)

    def read(self, name: str) -> Found | None:
        path = self.folder / name
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreWriteError(
                f"{path}: the lock could not be read: {error.strerror}"
            ) from error
        with os.fdopen(file, "rb") as opened:
            data, touched = opened.read(LIMIT), os.fstat(file).st_mtime
        return Found(data, self._now() - touched, _version(data))

    def swap(self, name: str, version: str, data: bytes) -> str | None:
        claim = f"{name}.{version}"
        if self.create(claim, data) is None:
            left = self.read(claim)
            owner = Owner.read(left.data) if left else None
            # Its creator died between two calls.
            if left and ((owner and owner.gone()) or left.age >= OLD):
                (self.folder / claim).unlink(missing_ok=True)
            return None
        try:
            # A process that replaced it before us deletes its claim only afterwards.
            found = self.read(name)
            if found is None or found.version != version:
                return None
            os.replace(self._beside(name, data), self.folder / name)
            return _version(data)
        finally:
            (self.folder / claim).unlink(missing_ok=True)

    def touch(self, name: str, version: str) -> str | None:
        found = self.read(name)
        if found is None or found.version != version:
            return None
        os.utime(self.folder / name)
        return version

    def remove(self, name: str, version: str) -> None:
        found = self.read(name)
        if found is not None and found.version == version:
            (self.folder / name).unlink(missing_ok=True)

    def _beside(self, name: str, data: bytes) -> Path:
        path = self.folder / f"{STAGING}{name}.{secrets.token_hex(4)}"
        try:
            path.write_bytes(data)
        except OSError as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise StoreWriteError(
                f"{self.folder / name}: the lock could not be made: {error.strerror}"
            ) from error
        return path

    def clear(self, name: str) -> None:
        """Delete what processes left behind that died while creating the lock ``name``."""
        now = self._now()
        for path in self.folder.glob(f"{STAGING}{name}.*"):
            with suppress(OSError):
                if now - path.stat().st_mtime >= OLD:
                    path.unlink()

    def _now(self) -> float:
        """Return the current time of the file system."""
        path = self._beside("now", b"")
        try:
            return os.stat(path).st_mtime
        finally:
            path.unlink(missing_ok=True)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@contextmanager
def made_folders(folder: Path) -> Iterator[None]:
    """Create ``folder`` and its parents; at the end delete those that were created and are
    empty.
    """
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreWriteError(f"{folder} could not be made: {error.strerror}") from error
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def owned(
    output: Where, who: str, *, inside: bool = False, break_lock: bool = False, wait: float = 0.0
) -> Iterator[Lock]:
    """Hold the lock of the local ``output`` while the block runs: ``OUTPUT.lock`` beside it, since
    a store is created and replaced by a rename, or ``.lock`` ``inside`` a folder that stays the
    same (and may be a mount point). Folders that are created for it and stay empty are deleted
    again. What a writer left beside ``output`` that was killed while it replaced it is deleted.
    """
    if isinstance(output, Url):
        from dspark.cache.files.bucket import Bucket, parent
        from dspark.cache.files.bucket_locks import BucketLocks

        there, name = (Bucket(output), LOCK) if inside else parent(output)
        name += "" if inside else LOCK
        with hold(
            BucketLocks(there), name, who, of=str(output), break_lock=break_lock, wait=wait
        ) as lock:
            yield lock
        return
    real = output.resolve()
    folder, name = (real, LOCK) if inside else (real.parent, real.name + LOCK)
    where = FolderLocks(folder)
    with (
        made_folders(folder),
        hold(where, name, who, of=str(output), break_lock=break_lock, wait=wait) as lock,
    ):
        where.clear(name)
        if not inside:
            clear_replaced(real)  # nobody else replaces it now
        yield lock
