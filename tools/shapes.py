"""The shape of a JSON value, checked as soon as it is read: a missing key gives an error message
before any work, not a KeyError in the middle of a model card. A shape is

- ``str``, ``bool``, ``int`` (a whole number) or ``float`` (a number);
- ``[shape]``: a list; ``{key: shape}``: an object with these keys (others are ignored, since a
  later release may add some);
- ``Each(shape)``: an object with at least one key, whatever their names; ``Maybe(shape)``: may be
  null; ``Optional(shape)``: may also be absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.cache.errors import DraftError


@dataclass(frozen=True, slots=True)
class Each:
    shape: Any


@dataclass(frozen=True, slots=True)
class Maybe:
    shape: Any


@dataclass(frozen=True, slots=True)
class Optional:
    shape: Any


_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def fault(value: Any, shape: Any) -> str | None:
    """Say how ``value`` violates ``shape``, as half a sentence; None if it does not."""
    return next(_faults(value, shape, ""), None)


def _faults(value: Any, shape: Any, name: str) -> Iterator[str]:
    called = name or "it"
    if isinstance(shape, Maybe | Optional):
        if value is not None:
            yield from _faults(value, shape.shape, name)
    elif isinstance(shape, type):
        if not _is(value, shape):
            yield f"{called} is {_short(value)}, not {_WORDS[shape]}"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{called} is {_short(value)}, not a list"
            return
        for i, item in enumerate(value):
            yield from _faults(item, shape[0], f"{name}[{i}]")
    elif not isinstance(value, dict):
        yield f"{called} is {_short(value)}, not an object"
    elif isinstance(shape, Each):
        if not value:
            yield f"{called} is empty"
        for key, item in value.items():
            yield from _faults(item, shape.shape, f"{name}.{key}".removeprefix("."))
    else:
        missing = [
            k for k, part in shape.items() if k not in value and not isinstance(part, Optional)
        ]
        if missing:
            yield f"{called} has no {', '.join(missing)}"
        for key in (k for k in shape if k in value):
            yield from _faults(value[key], shape[key], f"{name}.{key}".removeprefix("."))


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # which Python counts as a number
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def require(found: Any, shape: Any, where: Path | str, remedy: str) -> None:
    """Raise DraftError unless ``found``, read from ``where``, has ``shape``. ``remedy``: what was
    expected and what to do.
    """
    wrong = fault(found, shape)
    if wrong is not None:
        raise DraftError(f"{where}: {wrong}; {remedy}")
