"""The ``zarr.json`` of a store's groups and arrays: read within bounds, and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dspark.cache import json_text
from dspark.cache.errors import DamagedCacheError, read_error
from dspark.cache.files.place import Place
from dspark.cache.json_text import Json

KINDS = frozenset(
    {
        "bool",
        *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)),
        "float16",
        "float32",
        "float64",
    }
)  # dtypes of arrays


def read_attributes(place: Place, group: str = "") -> dict[str, Any]:
    """Read the attributes of a Zarr group of a store from its zarr.json."""
    name = f"{group}/zarr.json" if group else "zarr.json"
    path = place.where(name)
    try:
        data = _json(place, name)
    except OSError as error:
        raise read_error(path, error) from error
    except (ValueError, RecursionError) as error:
        raise DamagedCacheError(f"{path}: not JSON: {error}") from error
    attributes = data.get("attributes") if isinstance(data, dict) else None
    if not isinstance(attributes, dict):
        raise DamagedCacheError(f"{path}: no Zarr v3 group metadata found")
    return attributes


def read_shape(place: Place, array: str) -> tuple[tuple[int, ...], str]:
    """Read the shape and dtype of Zarr array ``array`` from its metadata. Raises DamagedCacheError
    or UnreadableError.
    """
    name = f"{array}/zarr.json"
    path = place.where(name)
    try:
        data = _json(place, name)
        shape, kind = data["shape"], data["data_type"]
        if not shape or not all(type(n) is int and n >= 0 for n in shape) or kind not in KINDS:
            raise ValueError(f"shape {shape}, data_type {kind}")
    except OSError as error:
        raise read_error(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCacheError(f"{path}: not the metadata of an array: {error}") from error
    return tuple(shape), kind


def _json(place: Place, name: str) -> Any:
    """Read a JSON object of a store, within the bounds of ``json_text``. Raises ValueError or
    OSError.
    """
    return json_text.loads(place.read(name, json_text.LARGEST).decode())


def write_attributes(group: Path, key: str, value: Json) -> None:
    """(Re)write a Zarr v3 group's metadata with one attribute, in place; the caller commits."""
    (group / "zarr.json").write_bytes(group_metadata(key, value))


def group_metadata(key: str, value: Json) -> bytes:
    """Return the zarr.json of a Zarr v3 group with one attribute."""
    data = {"zarr_format": 3, "node_type": "group", "attributes": {key: value}}
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
