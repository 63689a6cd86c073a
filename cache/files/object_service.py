"""The service behind a URL, through obstore: its client, retries, and its errors as ours.

obstore retries transient failures (5xx, slow-downs, cut connections) with growing pauses.
Credentials are left to the library and appear in none of our messages.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from dspark.cache.errors import (
    DamagedCacheError,
    StoreWriteError,
    UnreadableError,
    UsageError,
    first_line,
)
from dspark.cache.files.urls import Url

T = TypeVar("T")
RETRIES = 10
PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)  # seconds, before an answer that broke off is asked for again
PATIENCE = timedelta(seconds=180)  # in which a request is tried again
EXTRA = "pip install 'dspark[remote]'"
# Where the libraries look for a machine's role when they found no other credentials.
METADATA = re.compile(r"//(169\.254\.169\.254|169\.254\.170\.2|metadata\.google\.internal)")

# An answer by which the service refuses a request, whatever it is asked for.
REFUSED = re.compile(r"status code: (4(?!08|29)\d\d)\b")


@cache
def _memory(bucket: str) -> Any:
    """Return the objects of ``memory://BUCKET``, private to this process."""
    from obstore.store import MemoryStore

    return MemoryStore()


@cache
def connected(scheme: str, bucket: str, pid: int) -> Any:
    """Return the library's client for a bucket, one per process: none survives a fork."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise UsageError(
            f"{scheme}://{bucket}: stores by URL need the package obstore: {EXTRA}"
        ) from error
    if scheme == "memory":
        return _memory(bucket)
    options: dict[str, Any] = {
        "retry_config": {
            "max_retries": RETRIES,
            "retry_timeout": PATIENCE,
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=15),
                "base": 2,
            },
        },
        "client_options": {"timeout": "120s", "connect_timeout": "10s"},
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    # a self-hosted server, set explicitly
    if scheme == "s3" and endpoint.startswith("http://"):
        options["client_options"]["allow_http"] = True
    if scheme == "s3" and "AWS_ACCESS_KEY_ID" not in os.environ and "AWS_PROFILE" in os.environ:
        options["credential_provider"] = _profile(bucket)
    try:
        return from_url(f"{scheme}://{bucket}", **options)
    except Exception as error:
        raise UsageError(f"{scheme}://{bucket}: {_said(error)}") from error


def _profile(bucket: str) -> Any:
    """Return the credentials of a profile, which obstore leaves to boto3."""
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise UsageError(
            f"s3://{bucket}: AWS_PROFILE is read by boto3: pip install boto3"
        ) from error
    return Boto3CredentialProvider()


def _said(error: BaseException) -> str:
    """Return the library's message without URL parameters, which may be a signature; for one that
    was about credentials, what to do.
    """
    said = re.sub(r"\?[^\s)\"']*", "", first_line(error))
    if not METADATA.search(said):
        return said
    return (
        "no credentials were found: set them as for the service's own tools (for s3 "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), or give this machine a "
        f"role. {said}"
    )


class _ObjectError(OSError):
    """Its text is the object, and what is wrong with it."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class RemoteError(UnreadableError, _ObjectError):
    """The service did not do what was asked; ``errno`` is EACCES or EIO."""


class AbsentError(DamagedCacheError, _ObjectError, FileNotFoundError):
    """There is no such object."""


def again(work: Callable[[], T]) -> T:
    """Do ``work``, and retry if a response broke off: the library retries failed requests, but not
    every failed body.
    """
    from obstore.exceptions import GenericError

    for pause in PAUSES:
        try:
            return work()
        except (GenericError, ConnectionError) as error:
            if REFUSED.search(str(error)) or METADATA.search(str(error)):
                raise  # the same again, and the library has asked often enough
            time.sleep(pause * random.uniform(0.5, 1.5))
    return work()


def _no_bucket(what: Url) -> RemoteError:
    said = (
        f"the service has no bucket {what.bucket}: check the name and the account, or make the "
        "bucket with the service's own tools"
    )
    return RemoteError(errno.EIO, said, str(what))


@contextmanager
def service_errors(what: Url) -> Iterator[None]:
    """Convert the library's errors to OSError: ENOENT if there is no such object, EACCES, else
    EIO.
    """
    from obstore import exceptions as known

    try:
        yield
    except FileNotFoundError as error:
        raise AbsentError(errno.ENOENT, "no such object", str(what)) from error
    except known.NotFoundError as error:
        raise AbsentError(errno.ENOENT, "no such object", str(what)) from error
    except (known.PermissionDeniedError, known.UnauthenticatedError, PermissionError) as error:
        said = f"access denied; these credentials are not accepted, or lack a right. {_said(error)}"
        raise RemoteError(errno.EACCES, said, str(what)) from error
    except (known.AlreadyExistsError, known.PreconditionError, RemoteError):
        raise
    except (known.BaseError, OSError) as error:
        if (found := REFUSED.search(str(error))) and found[1] == "404":
            raise _no_bucket(what) from error
        raise RemoteError(errno.EIO, _said(error), str(what)) from error


@contextmanager
def writing_errors(what: Url, *, copied: bool = False) -> Iterator[None]:
    """``copied``: it is a copy, whose source may be missing; else only the bucket can be."""
    try:
        yield
    except AbsentError as error:
        if copied:
            raise
        raise StoreWriteError(
            f"{what} could not be written: {_no_bucket(what).strerror}."
        ) from error
    except OSError as error:
        raise StoreWriteError(
            f"{what} could not be written: {error.strerror}. Everything committed before is "
            "intact. Rerun the same command, with --resume if it has that flag."
        ) from error
