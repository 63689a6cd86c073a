"""Writing so that a crash leaves the old state or the new one: write beside, fsync, rename, fsync
the folder.
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

from safetensors import SafetensorError

from dspark.cache.errors import StoreWriteError

STAGING = ".staging-"  # a name that starts so was never committed and may be deleted


def fsync_path(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
    """The one way to write something whole or not at all: a path beside ``final``, which is fsynced
    and takes its name when the block ends.

    The block makes a file or a folder there. ``replace``: ``final`` may exist and is exchanged for
    it in one step; without it a folder that exists is an error, or, with ``keep``, stays what it
    is. ``token``: sets it apart from what other writers make for the same name. After an error
    nothing of it is left. Raises StoreWriteError.
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
    """Give ``new`` the name ``final``; ``keep``: unless a folder has it, then ``new`` is
    deleted.
    """
    try:
        os.replace(new, final)
    except OSError as error:
        if not keep or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        remove(new)


def _exchange(new: Path, old: Path) -> None:
    """Folder ``new`` takes the place of folder ``old``, which is deleted. One step where the kernel
    has one (Linux, most file systems).
    """
    aside = old.with_name(STAGING + old.name + ".old")
    remove(aside)  # of one that was killed here
    if not _renameat2(new, old):
        os.rename(old, aside)
        os.rename(new, old)
        remove(aside)
    remove(new)


def _renameat2(a: Path, b: Path) -> bool:
    """Exchange two paths atomically; whether that was done."""
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
    """Turn the disk's errors into StoreWriteError with what to do, and delete what was being
    written ``beside`` ``path``, so that a failed write frees its space.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        if number is None and isinstance(error, SafetensorError):
            raise  # tensors that cannot be stored are a mistake of ours, not the disk's
        free = shutil.disk_usage(existing_parent(path)).free
        what = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else str(error)
        # A disk that failed may fail again here; what is left then is staging, which no reader
        # takes for data.
        with suppress(OSError):
            remove(beside or path.with_name(STAGING + path.name))
        raise StoreWriteError(
            f"{path} could not be written: {what} ({free / 1e9:.2f} GB free there). "
            "Everything committed before is intact. Free space (or fix access) and rerun the "
            "same command, with --resume if it has that flag."
        ) from error


def error_number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors has it in its text only (0.5: ``code: 28``)."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"(?:os error|code:) (\d+)", str(error))
    return int(found[1]) if found else None


def remove(path: Path) -> None:
    """Delete a file, a folder or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def existing_parent(path: Path) -> Path:
    """The nearest ancestor of ``path`` that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
