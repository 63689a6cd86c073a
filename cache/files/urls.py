"""Parse where a store is: a local path or the URL of an object store. Nothing is loaded here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from dspark.cache.errors import UsageError

REMOTE = ("s3", "gs", "az")
MEMORY = "memory"  # for tests: its objects end with the process, so no command takes it
# ``Path("s3://b/x")`` is ``s3:/b/x``, which nobody means as a local folder either.
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Url:
    """A place in an object store, such as ``s3://bucket/hs.zarr``; without a trailing slash. ``/``,
    ``name`` and ``str`` work as for a Path.
    """

    text: str

    @property
    def scheme(self) -> str:
        return self.text.partition("://")[0]

    @property
    def bucket(self) -> str:
        """Return the bucket (or container, as some services call it)."""
        return self.text.partition("://")[2].partition("/")[0]

    @property
    def key(self) -> str:
        """Return the path within the bucket."""
        return self.text.partition("://")[2].partition("/")[2]

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    def resolve(self) -> Url:
        return self

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    def __str__(self) -> str:
        return self.text


Where = Path | Url


def where(given: str | Path | Url) -> Where:
    """Tell a path from a URL. Raises UsageError for an unsupported scheme, and for a URL that
    contains credentials.
    """
    if isinstance(given, Url):
        return given
    found = URL.fullmatch(str(given))
    if not found:
        return Path(given)
    scheme, rest = found[1].lower(), found[3].strip("/")
    if scheme == "file":
        if found[2] and not found[3].startswith("/"):
            raise UsageError(f"{given}: expected file:///PATH, or the path alone.")
        return Path(f"/{rest}")
    if scheme not in (*REMOTE, MEMORY):
        raise UsageError(
            f"{given}: stores are local folders or at {', '.join(f'{s}://' for s in REMOTE)}; "
            f"{scheme}:// is not supported."
        )
    parts = urlsplit(f"{scheme}://{rest}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"{scheme}://...: the URL contains credentials or parameters. Give "
            f"{scheme}://BUCKET/NAME, and pass credentials as for the service's own tools "
            "(environment, profile or the machine's role)."
        )
    bucket, _, key = rest.partition("/")
    if not bucket or not key:
        raise UsageError(f"{given}: expected {scheme}://BUCKET/NAME, a store within a bucket.")
    if any(p in ("", ".", "..") for p in key.split("/")):
        raise UsageError(f"{given}: the name contains an empty part, `.` or `..`.")
    return Url(f"{scheme}://{rest}")


def refuse_url(given: str | Path, flag: str) -> None:
    """Raise UsageError if ``given``, which ``flag`` takes for a local path, is a URL: it would
    become a folder called ``s3:``.
    """
    if URL.fullmatch(str(given)):
        raise UsageError(
            f"{flag} {given}: expected a local path. Only stores of hidden states can be at a URL; "
            "write to a local folder, and copy it with the service's own tools."
        )


def beside(output: Where, suffix: str) -> Path:
    """Return a process's own local file for ``output``: beside a local output, in the working
    folder for a URL.
    """
    if isinstance(output, Url):
        return Path(output.name + suffix)
    return output.with_name(output.name + suffix)


class StoreType(click.ParamType):  # type: ignore[type-arg]  # no generic before click 8.4
    """A path or a URL of a store; an unknown scheme is wrong usage."""

    name = "PATH_OR_URL"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Where:
        try:
            found = where(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        if isinstance(found, Url) and found.scheme == MEMORY:
            self.fail(f"{value}: objects in memory end with the command.", param, ctx)
        return found


class GivenType(StoreType):
    """A store at a URL, or a local path of anything that exists."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Where:
        found = super().convert(value, param, ctx)
        if isinstance(found, Path) and not found.exists():
            self.fail(f"Path {str(found)!r} does not exist.", param, ctx)
        return found


STORE = StoreType()
GIVEN = GivenType()
