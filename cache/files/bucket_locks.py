"""Locks as objects of a bucket, by conditional puts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from dspark.cache.errors import StoreWriteError
from dspark.cache.files.bucket import Bucket
from dspark.cache.files.lock import Found
from dspark.cache.files.object_service import again, service_errors, writing_errors


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
