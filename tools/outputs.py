"""Files that a command writes beside what it prints. An unwritable one is refused before the work,
which would otherwise be lost.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from dspark.cache.errors import UsageError
from dspark.cache.files.atomic import STAGING, existing_parent, write_errors, write_file
from dspark.cache.files.urls import refuse_url


class OutputFile(click.ParamType):  # type: ignore[type-arg]  # no generic before click 8.4
    """A file to write at the end, as a Path. Refused by flag name, with exit code 2, before
    anything is opened or loaded.
    """

    name = "FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            refuse_url(value, "output")
            refuse_unwritable(Path(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return Path(value)


OUTPUT_FILE = OutputFile()


def refuse_unwritable(path: Path) -> None:
    """Raise UsageError unless ``save`` can put a file at ``path``, as far as can be known without
    saving. Leaves nothing behind, in the folder or of an older file.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(
                f"{path} exists and is not a file, so it is not replaced. Choose another path."
            )
        # what else it says is wrong with the name: too long, below a file
        with suppress(FileNotFoundError):
            os.lstat(path.with_name(STAGING + path.name))
        # Without a name where the system can, else deleted at once.
        with tempfile.TemporaryFile(dir=existing_parent(path.parent)):
            pass
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}. Choose another path, or get access to "
            "its folder."
        ) from error


def save(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, completely or not at all, creating missing folders."""
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data)
