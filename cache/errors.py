"""Errors caused by a user, a disk or a foreign file. Each says what was found, what was expected,
and what to do next.

``exit_code`` is what a command returns: 1 = the work failed or found something wrong, 2 = wrong
usage. Programming errors are ``assert``s instead.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# Errors that mean a file is missing, or is of another kind; every other read error says nothing
# about its bytes.
GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})


class DsparkError(Exception):
    """Base of the errors that a command turns into one line on stderr and an exit code."""

    exit_code = 1


class Stopped(DsparkError):
    """The work was stopped by a signal. The message says what is safe."""


class UsageError(DsparkError):
    """The flags, or a file that the user wrote, are not what the command accepts."""

    exit_code = 2


class CacheError(DsparkError):
    """A store cannot be used as it is."""


class NotACacheError(CacheError):
    """The folder is missing, or is not a dspark store."""

    exit_code = 2


class FormatVersionError(CacheError):
    """The store was written in a format version this release does not read."""


class IncompleteCacheError(CacheError):
    """The dump of this store has not finished."""


class DamagedCacheError(CacheError):
    """Bytes on disk are not the bytes that were written. The message names file and chunk."""


class UnreadableError(CacheError):
    """Part of a store cannot be read right now: an I/O error, no permission, too few file handles.
    It may be intact.
    """


class MismatchError(CacheError):
    """Two things that must belong together do not: cache and target, checkpoint and cache, resume
    and plan.
    """


class ExistsError(CacheError):
    """The output exists; nothing is overwritten without --overwrite."""

    exit_code = 2


class LockedError(CacheError):
    """Another process is writing there. The message says which."""


class LostLockError(CacheError):
    """This process's lock was broken by a user who believed the process dead."""


class StoreWriteError(CacheError):
    """A part could not be written (disk full, no permission). Parts committed before it are
    intact.
    """


class DataError(DsparkError):
    """A row of the corpus is malformed. The message names file and line."""


class TargetError(DsparkError):
    """The target cannot be used: it is not a language model that can be read here, or a part of it
    is missing.
    """


class EngineError(DsparkError):
    """The target could not be run, or its states failed the self-check."""


class TrainError(DsparkError):
    """Training cannot start or continue (no supervised target, non-finite loss)."""


class DraftError(DsparkError):
    """A draft folder is not one that can be scored or served."""


def read_error(path: object, error: OSError) -> DamagedCacheError | UnreadableError:
    """Convert ``error``, raised while reading ``path``: damaged if the file is missing, else
    unreadable.
    """
    if error.errno in GONE:
        return DamagedCacheError(f"{path}: {error.strerror}")
    if isinstance(error, UnreadableError):  # of an object store
        return UnreadableError(
            f"{path}: cannot be read now: {error.strerror}. It may well be intact: check the "
            "credentials, the name and the network, and try again."
        )
    return UnreadableError(
        f"{path}: cannot be read now: {error.strerror or error}. It may well be intact: check "
        "the disk, the permissions and the limit on open files (ulimit -n), and try "
        "again."
    )


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Convert system errors raised while reading ``path``, as ``read_error`` does."""
    try:
        yield
    except OSError as error:
        raise read_error(path, error) from error


def first_line(error: BaseException) -> str:
    """Return the first line of ``error``, at most 200 characters; its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
