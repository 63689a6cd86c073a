"""``metrics.jsonl`` read by one rule: an object with its step per line; empty lines are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspark.cache import json_text
from dspark.cache.errors import DraftError
from dspark.train.run.folder import METRICS

REMEDY = "every line is an object that dspark-train wrote; fix or remove the line"


def read_metrics(
    folder: Path, *, growing: bool = False, remedy: str = REMEDY
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``file:line`` and row of the ``metrics.jsonl`` in ``folder``; nothing if there is none.
    Raises DraftError, naming the line.

    ``growing``: a training writes it, or was killed while it did: a last line without its end is
    left out, unless it is complete.
    """
    path = folder / METRICS
    if not path.exists():
        return
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json_text.loads(line)
        except ValueError as error:
            if growing and number == len(lines) and not line.endswith("\n"):
                return
            raise DraftError(f"{where} is not JSON ({error}); {remedy}") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise DraftError(f"{where}: {line[:80].strip()} has no step; {remedy}")
        yield where, row


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines(keepends=True)
    except OSError as error:
        raise DraftError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DraftError(
            f"{path} is not text ({error}); restore a complete copy of the file"
        ) from error
