"""The manifest in its place: read from a store, written to it."""

from __future__ import annotations

from pathlib import Path

from dspark.cache.canonical import sealed, unseal
from dspark.cache.errors import DamagedCacheError, NotACacheError, reading
from dspark.cache.files.layout import INDEX, PARTS, ROOT_KEY, TARGET
from dspark.cache.files.metadata import group_metadata, read_attributes
from dspark.cache.files.place import Place, place_of
from dspark.cache.files.urls import Where
from dspark.cache.manifest import READ_VERSIONS, Manifest


def read_manifest(path: str | Where) -> Manifest:
    """Read the manifest of the store at ``path``, a folder or a URL. Refuses, with a specific
    error, what is not a store and an unknown version.
    """
    place = place_of(path)
    path = place.where("")
    if isinstance(path, Path):
        with reading(path):
            _check_folder(path)
    try:
        attributes = read_attributes(place)
    except DamagedCacheError as error:
        if place.remote and not place.exists("zarr.json"):
            _refuse_absent(
                path, any_of_it=place.exists(), parts=place.remote and bool(place.list(PARTS))
            )
        raise DamagedCacheError(f"{error}. {rebuild_hint(path)}") from error
    if ROOT_KEY not in attributes:
        raise NotACacheError(
            f"{path}: a Zarr folder, but not a dspark store (its attributes are "
            f"{sorted(attributes)})"
        )
    where = str(path / "zarr.json")
    data = attributes[ROOT_KEY]
    if isinstance(data, dict) and data.get("format_version") not in READ_VERSIONS:
        return Manifest.from_json(
            data, where
        )  # report the version found before applying our checksum rule
    try:
        return Manifest.from_json(unseal(data, where), where)
    except DamagedCacheError as error:
        raise DamagedCacheError(f"{error}. {rebuild_hint(path)}") from error


def _check_folder(path: Path) -> None:
    if not (path / "zarr.json").is_file():
        _refuse_absent(path, any_of_it=path.exists(), parts=(path / PARTS).is_dir())
    for name in ("zarr.json", PARTS, INDEX, TARGET):
        if (path / name).is_symlink():
            raise DamagedCacheError(f"{path / name}: a link. A store contains no links.")


def _refuse_absent(path: Where, *, any_of_it: bool, parts: bool) -> None:
    """Say why there is no manifest at ``path``."""
    if not any_of_it:
        found = "no such folder" if isinstance(path, Path) else "no such store"
        raise NotACacheError(
            f"{path}: {found}. dspark-dump writes one: dspark-dump --model MODEL --data FILE "
            f"--output {path}"
        )
    more = f". {rebuild_hint(path)}" if parts else ""
    raise NotACacheError(f"{path}: not a dspark store (no zarr.json in it){more}")


def rebuild_hint(path: Where) -> str:
    """Return the next step if index or manifest are not what was written."""
    return (
        f"Run dspark-tools verify --rebuild-index {path}: it rebuilds the index and the manifest "
        "from the parts."
    )


def write_manifest(place: Place, manifest: Manifest) -> None:
    """Write the manifest of the store at ``place``, or replace it."""
    place.write("zarr.json", group_metadata(ROOT_KEY, sealed(manifest.to_json())))
