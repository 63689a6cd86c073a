"""A store in an object store, through obstore: the second implementation of ``Place``.

Nothing is renamed there. A part's objects are written first and its record last, so what a dead
writer left has no record and does not count. If two writers made the same part, the one that
finishes its objects later also writes the record, so the record fits the objects, whoever wrote
them.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dspark.cache.errors import ExistsError, reading
from dspark.cache.files.atomic import staged
from dspark.cache.files.block_cache import BlockCache, keeping
from dspark.cache.files.layout import PARTS
from dspark.cache.files.object_service import again, connected, service_errors, writing_errors
from dspark.cache.files.place import Bytes, Place, in_parallel, refuse_larger
from dspark.cache.files.urls import Url

RECORD = "zarr.json"
MARK = f"{PARTS}/{RECORD}"
PIECE = 32 << 20  # bytes of one request of a large upload


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
