"""Writing so that a crash leaves the old state or the new one: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

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


def write_file(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, atomically."""
    staged = path.with_name(STAGING + path.name)
    with write_errors(path):
        with open(staged, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
        fsync_path(path.parent)


def commit_folder(staged: Path, final: Path) -> None:
    """Make the finished folder ``staged`` appear as ``final``, durably. ``final`` must not exist."""
    with write_errors(final):
        fsync_tree(staged)
        os.rename(staged, final)
        fsync_path(final.parent)


def clear_staging(folder: Path) -> None:
    """Delete what an interrupted writer left in ``folder``."""
    for entry in folder.iterdir():
        if entry.name.startswith(STAGING):
            remove(entry)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the disk's errors into StoreWriteError with what to do, and delete what was being written beside ``path``: a full disk is not left full of it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        if number is None and isinstance(error, SafetensorError):
            raise  # tensors that cannot be stored are a mistake of ours, not the disk's
        free = shutil.disk_usage(existing_parent(path)).free
        what = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else str(error)
        # A disk that failed may fail again here; what is left then is staging, which no reader takes for data.
        with suppress(OSError):
            remove(path.with_name(STAGING + path.name))
        raise StoreWriteError(
            f"{path} could not be written: {what} ({free / 1e9:.2f} GB free there). "
            "Everything committed before is intact. Free space (or fix access) and rerun the same command, with --resume if it has that flag."
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
