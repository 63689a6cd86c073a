"""Dataclasses made from JSON objects, whose keys and types are checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from dspark.cache.errors import DamagedCacheError

T = TypeVar("T")


def build(kind: type[T], data: Any, where: str) -> T:
    """Make dataclass ``kind`` from a JSON object. Missing keys, unknown keys and values of the
    wrong type are reported as damage, by name.
    """
    if not isinstance(data, Mapping):
        raise DamagedCacheError(f"{where}: found {type(data).__name__}, expected an object")
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    required = {
        n
        for n, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(data))
    if unknown or missing:
        raise DamagedCacheError(f"{where}: unknown keys {unknown}, missing keys {missing}")
    if wrong := wrong_type(kind, data):
        raise DamagedCacheError(f"{where}: {wrong}")
    return kind(**dict(data))


def wrong_type(kind: type[Any], data: Mapping[str, Any]) -> str | None:
    """The first value of ``data`` that is not of the type which its field of dataclass ``kind``
    has, in words.
    """
    for name, hint in _hints(cast(Any, kind)).items():
        if name in data and not _fits(data[name], hint):
            return f"{name} is {short(data[name])}, expected {hint}"
    return None


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a JSON ``value`` fits a field of type ``hint``. Whole numbers must be below
    2**53, which every JSON reader represents exactly.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (UnionType, Union):
        return any(_fits(value, one) for one in inner)
    if kind in (list, tuple) and inner:
        return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value)
    if kind in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if kind is int:
        return type(value) is int and abs(value) < 2**53
    kinds = {Any: object, float: int | float, tuple: list | tuple}
    return isinstance(value, kinds.get(kind, kind)) and not (
        kind is float and isinstance(value, bool)
    )


def short(value: Any) -> str:
    """Return the ``repr`` of a value for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
