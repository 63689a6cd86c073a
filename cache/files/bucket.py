"""A store in an object store, through obstore: the second implementation of ``Place``.

Nothing is renamed there. A part's objects are written first and its record last, so what a dead
writer left has no record and does not count. If two writers made the same part, the one that
finishes its objects later also writes the record, so the record fits the objects, whoever wrote
them. obstore retries transient failures (5xx, slow-downs, cut connections) with growing pauses.
Credentials are left to the library and appear in none of our messages.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dspark.cache.errors import (
    DamagedCacheError,
    ExistsError,
    StoreWriteError,
    UnreadableError,
    UsageError,
    first_line,
    reading,
)
from dspark.cache.files.atomic import staged
from dspark.cache.files.block_cache import BlockCache, keeping
from dspark.cache.files.layout import PARTS
from dspark.cache.files.lock import Found
from dspark.cache.files.place import Bytes, Place, in_parallel, refuse_larger
from dspark.cache.files.urls import Url

T = TypeVar("T")
RECORD = "zarr.json"
MARK = f"{PARTS}/{RECORD}"
RETRIES = 10
PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)  # seconds, before an answer that broke off is asked for again
PIECE = 32 << 20  # bytes of one request of a large upload
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


class RemoteFile:
    """An object of known ``size``; ``version`` identifies its content, so that pieces of it may be
    cached locally.
    """

    def __init__(self, bucket: Bucket, name: str, size: int, version: str) -> None:
        self._bucket, self._name, self.size, self._version = bucket, name, size, version

    def read(self, start: int, length: int) -> Bytes:
        def fetch(start: int, length: int) -> bytes:
            return self._bucket.range(self._name, start, length)

        if not self._version:
            return np.frombuffer(fetch(start, min(length, self.size - start)), np.uint8)
        return self._bucket.pieces.read(self._key, self.size, start, length, fetch)

    @property
    def _key(self) -> str:
        return f"{self._bucket.url / self._name} {self._version}"

    def view(self) -> Bytes:
        return self.read(0, self.size)

    def forget(self) -> bool:
        return bool(self._version) and self._bucket.pieces.forget(self._key, self.size)


class Bucket:
    """A store at ``url``. Can be pickled (but ``memory://`` differs per process)."""

    remote = True

    def __init__(self, url: Url) -> None:
        self.url = url
        self.requests = 0  # made here, but for those of listings behind their first

    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self.url,)

    @property
    def client(self) -> Any:
        """The library's client, for one request."""
        self.requests += 1
        return connected(self.url.scheme, self.url.bucket, os.getpid())

    @property
    def pieces(self) -> BlockCache:
        return _pieces()

    def key(self, name: str) -> str:
        """Return the key of object ``name`` in the bucket."""
        return "/".join(part for part in (self.url.key, name) if part)

    def where(self, name: str) -> Url:
        return self.url / name if name else self.url

    def open(self, name: str, size: int | None = None, version: str = "") -> RemoteFile:
        return RemoteFile(self, name, self.size(name) if size is None else size, version)

    def read(self, name: str, limit: int | None = None) -> bytes:
        with service_errors(self.where(name)):
            return again(lambda: self._whole(name, limit))

    def _whole(self, name: str, limit: int | None) -> bytes:
        import obstore

        found = obstore.get(self.client, self.key(name))
        if limit is not None:
            refuse_larger(found.meta["size"], limit)
        return bytes(found.bytes())

    def range(self, name: str, start: int, length: int) -> bytes:
        """Read bytes ``[start, start + length)``, fewer if the object ends earlier."""
        import obstore

        with service_errors(self.where(name)):
            key = self.key(name)
            return again(
                lambda: bytes(obstore.get_range(self.client, key, start=start, length=length))
            )

    def size(self, name: str) -> int:
        import obstore

        with service_errors(self.where(name)):
            return int(again(lambda: obstore.head(self.client, self.key(name)))["size"])

    def exists(self, name: str = "") -> bool:
        """Tell whether an object exists; without a name, whether the store has any."""
        try:
            if name:
                self.size(name)
                return True
            return bool(self._objects("", first=True))
        except FileNotFoundError:
            return False

    def _objects(self, name: str, *, first: bool = False) -> list[Any]:
        """Yield what the service knows about every object below ``name``, or about one of them."""
        import obstore

        def pages() -> list[Any]:
            found = obstore.list(self.client, self.key(name), chunk_size=1 if first else 1000)
            return list(next(iter(found), [])) if first else [o for page in found for o in page]

        with service_errors(self.where(name)):
            return again(pages)

    def list(self, name: str) -> list[str]:
        import obstore

        with service_errors(self.where(name)):
            found = again(lambda: obstore.list_with_delimiter(self.client, self.key(name)))
        paths = [*found["common_prefixes"], *(o["path"] for o in found["objects"])]
        return sorted(p.rstrip("/").rpartition("/")[2] for p in paths)

    def sizes(self, name: str) -> dict[str, int]:
        base = self.key(name) + "/"
        return {o["path"].removeprefix(base): int(o["size"]) for o in self._objects(name)}

    def write(self, name: str, data: bytes) -> None:
        import obstore

        with writing_errors(self.where(name)), service_errors(self.where(name)):
            again(lambda: obstore.put(self.client, self.key(name), data))

    def remove(self, name: str) -> None:
        import obstore

        names = [name] if name and self.exists(name) else []
        names += [f"{name}/{n}" if name else n for n in self.sizes(name)]
        # The record first: objects without one do not count. Last what tells that they were a
        # store, so that one that was removed in part can be removed again.
        names.sort(key=lambda n: (n == MARK, not n.endswith(RECORD), n.count("/"), n))
        with writing_errors(self.where(name)), service_errors(self.where(name)):
            for start in range(0, len(names), 1000):
                some = [self.key(n) for n in names[start : start + 1000]]
                again(functools.partial(obstore.delete, self.client, some))

    def link(self, other: Place, source: str, name: str) -> None:
        import obstore

        to = self.where(name)
        if isinstance(other, Bucket) and (other.url.scheme, other.url.bucket) == (
            self.url.scheme,
            self.url.bucket,
        ):
            with writing_errors(to, copied=True), service_errors(other.where(source)):
                again(lambda: obstore.copy(self.client, other.key(source), self.key(name)))
            return
        with other.local_file(source) as path:
            with reading(path):
                path.stat()
            with writing_errors(to), service_errors(to):
                again(lambda: obstore.put(self.client, self.key(name), path, chunk_size=PIECE))

    @contextmanager
    def commit(self, name: str, token: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="dspark-part-") as made:
            folder = Path(made) / "part"
            yield folder
            if not self.exists(f"{name}/{RECORD}"):
                self.upload(folder, name)

    @contextmanager
    def replace(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="dspark-group-") as made:
            folder = Path(made) / "group"
            yield folder
            self.upload(folder, name)

    def upload(self, folder: Path, name: str, *, new: bool = False) -> None:
        """Write the files of ``folder`` below ``name``, its own ``zarr.json`` last. ``new``: raises
        ExistsError if one exists already.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        last = folder / RECORD

        def put(path: Path) -> None:
            to = f"{name}/{path.relative_to(folder).as_posix()}".lstrip("/")
            with writing_errors(self.where(to)), service_errors(self.where(to)):
                again(lambda: obstore.put(self.client, self.key(to), path, chunk_size=PIECE))

        in_parallel(put, [p for p in files if p != last])
        to = f"{name}/{RECORD}".lstrip("/")
        data = last.read_bytes()
        with writing_errors(self.where(to)), service_errors(self.where(to)):
            try:
                again(lambda: obstore.put(self.client, self.key(to), data, mode="create"))
            except AlreadyExistsError as error:
                # A put whose response was lost is retried, and finds its own object.
                if self.read(to) == data:
                    return
                if new:
                    raise ExistsError(
                        f"{self.where(to)} exists: another process has made it."
                    ) from error
                again(lambda: obstore.put(self.client, self.key(to), data))

    @contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="dspark-object-") as made:
            path = Path(made) / name.rpartition("/")[2]
            self._fetch(name, path)
            yield path

    def _fetch(self, name: str, to: Path) -> None:
        import obstore

        to.parent.mkdir(parents=True, exist_ok=True)

        def whole() -> None:
            found = obstore.get(self.client, self.key(name))
            with open(to, "wb") as file:
                for piece in found.stream(min_chunk_size=8 << 20):
                    file.write(piece)

        with service_errors(self.where(name)):
            again(whole)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="dspark-part-") as made:
            folder = Path(made) / name
            folder.mkdir(parents=True)
            in_parallel(lambda n: self._fetch(f"{name}/{n}", folder / n), sorted(self.sizes(name)))
            yield folder

    def kept(self, name: str, version: str) -> Path:
        """Return a local copy of the objects below ``name``, made once; ``version`` identifies its
        content.
        """
        final = self.pieces.folder.with_name("whole") / f"{self.url.name}-{name}-{version[:24]}"
        sizes = self.sizes(name)
        if {n: (final / n).stat().st_size for n in sizes if (final / n).is_file()} == sizes:
            return final
        with keeping(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.exists():
                shutil.rmtree(final)
            with staged(final, keep=True, token=f".{os.getpid()}") as new:
                new.mkdir()
                in_parallel(lambda n: self._fetch(f"{name}/{n}", new / n), sorted(sizes))
        return final

    def free(self) -> int | None:
        """Return the free space in bytes; None = unknown."""
        return None


@cache
def _pieces() -> BlockCache:
    return BlockCache.of_environment()


def parent(url: Url) -> tuple[Bucket, str]:
    """Return the place that holds the store at ``url``, and its name there."""
    head, _, name = url.text.rpartition("/")
    return Bucket(Url(head)), name


class BucketLocks:
    """Locks as objects, by conditional puts; an object's version is its ETag. Ages are by the clock
    of the service's answers.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def create(self, name: str, data: bytes) -> str | None:
        from obstore.exceptions import AlreadyExistsError

        try:
            return self._put(name, data, "create")
        except AlreadyExistsError:
            found = self.read(name)
            return found.version if found and found.data == data else None

    def _put(self, name: str, data: bytes, mode: Any) -> str:
        import obstore
        from obstore.exceptions import NotSupportedError

        where = self._bucket.where(name)
        with writing_errors(where), service_errors(where):
            try:
                store, key = self._bucket.client, self._bucket.key(name)
                return str(again(lambda: obstore.put(store, key, data, mode=mode))["e_tag"])
            except NotSupportedError as error:
                raise StoreWriteError(
                    f"{where}: this service has no conditional put, so it cannot tell one writer "
                    "from another. "
                    "Write to a local folder and copy it there."
                ) from error

    def read(self, name: str) -> Found | None:
        import obstore

        where = self._bucket.where(name)

        def get() -> tuple[bytes, Any]:
            found = obstore.get(self._bucket.client, self._bucket.key(name))
            return bytes(found.bytes()), found.meta

        try:
            with service_errors(where):
                data, about = again(get)
        except FileNotFoundError:
            return None
        age = (datetime.now(UTC) - about["last_modified"]).total_seconds()
        return Found(data, age, str(about["e_tag"]))

    def swap(self, name: str, version: str, data: bytes) -> str | None:
        from obstore.exceptions import PreconditionError

        try:
            return self._put(name, data, {"e_tag": version})
        except (PreconditionError, FileNotFoundError, StoreWriteError) as error:
            if isinstance(error, StoreWriteError) and not isinstance(
                error.__cause__, FileNotFoundError
            ):
                raise
            found = self.read(name)
            return found.version if found and found.data == data else None

    def touch(self, name: str, version: str) -> str | None:
        found = self.read(name)
        if found is None or found.version != version:
            return None
        return self.swap(name, version, found.data)

    def remove(self, name: str, version: str) -> None:
        import obstore

        found = self.read(name)
        if found is not None and found.version == version:
            with service_errors(self._bucket.where(name)):
                again(lambda: obstore.delete(self._bucket.client, self._bucket.key(name)))
