"""Write so that a crash leaves either the old state or the new one: write beside, fsync, rename,
fsync the folder.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dspark.cache.errors import StoreWriteError

STAGING = ".staging-"  # a name with this prefix was never committed and may be deleted


def fsync_path(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def start_writeback(fd: int, start: int, length: int) -> None:
    """Let the kernel begin to write these bytes of a file to disk, and do not wait: an fsync at the
    end then finds little to do. Without effect where the kernel has no such call.
    """
    _sync_file_range(ctypes.c_int(fd), ctypes.c_int64(start), ctypes.c_int64(length), 2)


_sync_file_range: Any = getattr(ctypes.CDLL(None), "sync_file_range", lambda *a: -1)


def fsync_tree(root: Path) -> None:
    """fsync every file and folder below ``root``, and ``root``."""
    for folder, _, files in os.walk(root):
        for name in files:
            fsync_path(Path(folder) / name)
        fsync_path(Path(folder))


@contextmanager
def staged(
    final: Path, *, replace: bool = False, keep: bool = False, token: str = ""
) -> Iterator[Path]:
    """Write something completely or not at all: yields a path beside ``final``, which is fsynced
    and renamed to ``final`` when the block ends. The block creates a file or a folder there.
    ``replace``: ``final`` may exist and is exchanged in one step; without it, an existing folder is
    an error, or, with ``keep``, stays unchanged. ``token``: distinguishes it from other writers'
    attempts for the same name. After an error nothing is left behind. Raises StoreWriteError.
    """
    path = final.with_name(STAGING + final.name + token)
    with write_errors(final, path):
        remove(path)
        try:
            yield path
            fsync_tree(path) if path.is_dir() else fsync_path(path)
            if replace and final.is_dir() and path.is_dir():
                _exchange(path, final)
            else:
                _rename(path, final, keep)
            fsync_path(final.parent)
        except BaseException:
            with suppress(OSError):
                remove(path)
            raise


def _rename(new: Path, final: Path, keep: bool) -> None:
    """Rename ``new`` to ``final``; with ``keep``, if a folder has that name, delete ``new``
    instead.
    """
    try:
        os.replace(new, final)
    except OSError as error:
        if not keep or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        remove(new)


def _exchange(new: Path, old: Path) -> None:
    """Put folder ``new`` in the place of folder ``old``, which is deleted: in one step if the
    kernel can (Linux, most file systems).
    """
    aside = _aside(old)
    remove(aside)  # left by a process that was killed here
    if not _renameat2(new, old):
        os.rename(old, aside)
        os.rename(new, old)
        remove(aside)
    remove(new)


def _aside(old: Path) -> Path:
    return old.with_name(STAGING + old.name + ".old")


def clear_replaced(final: Path) -> None:
    """Delete what a ``staged`` that was killed while it replaced folder ``final`` left beside it:
    the new one or the old one, which may be as large as ``final``.
    """
    for path in (final.with_name(STAGING + final.name), _aside(final)):
        remove(path)


def _renameat2(a: Path, b: Path) -> bool:
    """Exchange two paths atomically; returns whether that was possible."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def write_file(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, atomically."""
    with staged(path, replace=True) as to:
        to.write_bytes(data)


def clear_staging(folder: Path) -> None:
    """Delete what an interrupted writer left in ``folder``."""
    for entry in folder.iterdir():
        if entry.name.startswith(STAGING):
            remove(entry)


@contextmanager
def write_errors(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Turn disk errors into StoreWriteError, which says what to do, and delete what was being
    written ``beside`` ``path``, so that a failed write frees its space.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        if number is None and isinstance(error, SafetensorError):
            raise  # tensors that cannot be stored are our bug, not the disk's
        free = shutil.disk_usage(existing_parent(path)).free
        what = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else str(error)
        # A disk that failed may fail again here; then a staging name remains, which no reader
        # mistakes for data.
        with suppress(OSError):
            remove(beside or path.with_name(STAGING + path.name))
        raise StoreWriteError(
            f"{path} could not be written: {what} ({free / 1e9:.2f} GB free there). "
            "Everything committed before is intact. Free space (or fix access) and rerun the "
            "same command, with --resume if it has that flag."
        ) from error


def error_number(error: OSError | SafetensorError) -> int | None:
    """Return the system's number of an error; safetensors has it only in its text (0.5: ``code:
    28``).
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"(?:os error|code:) (\d+)", str(error))
    return int(found[1]) if found else None


def remove(path: Path) -> None:
    """Delete a file, a folder or a link, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def existing_parent(path: Path) -> Path:
    """Return the nearest existing ancestor of ``path``."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
