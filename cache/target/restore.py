"""Rewrite what is missing or damaged in a store's ``target/``."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dspark.cache.errors import MismatchError
from dspark.cache.files.atomic import STAGING, fsync_path, fsync_tree, remove, write_errors
from dspark.cache.files.layout import TARGET, TARGET_WEIGHTS
from dspark.cache.files.place import Place
from dspark.cache.files.urls import Where
from dspark.cache.manifest import Manifest
from dspark.cache.target.files import damaged_files, write_target
from dspark.cache.target.frozen import FrozenTarget

SAME_TARGET = (
    "Use the target revision and the dtype that the store was started with, or --overwrite."
)


def restore(
    place: Place, manifest: Manifest, target: FrozenTarget, files: Mapping[str, bytes]
) -> list[str]:
    """Rewrite missing or damaged files of ``target/``, atomically one by one; returns their names.
    Raises MismatchError, changing nothing, if ``target`` and ``files`` do not match the manifest's
    hashes: new parts would hold states of another model than the existing ones. Hashes the weights
    in the store and ``target`` once each; writes only if something is wrong.
    """
    path = place.where("")
    if not isinstance(path, Path):
        return _restore_remote(place, manifest, target, files)
    folder, staged = path / TARGET, path / (STAGING + TARGET)
    wrong = _wrong(folder, manifest, files)
    if not wrong:
        expected = manifest.target.weights_sha256
        found = target.sha256_in(folder / TARGET_WEIGHTS)
        if found != expected:
            raise MismatchError(
                f"{path}: this run's target is not the one that the store was started "
                f"with: sha256 of its embedding, final norm and head is {found}, "
                f"the manifest says {expected}. {SAME_TARGET}"
            )
        return []
    with write_errors(folder):
        remove(staged)
        write_target(staged, target, manifest.target.config, files)
        try:
            _refuse_other(path, manifest, staged, wrong)
        except MismatchError:
            shutil.rmtree(staged)
            raise
        fsync_tree(staged)
        folder.mkdir(exist_ok=True)
        for name in wrong:
            os.replace(staged / name, folder / name)
        fsync_path(folder)
        shutil.rmtree(staged)
    return wrong


def _restore_remote(
    place: Place, manifest: Manifest, target: FrozenTarget, files: Mapping[str, bytes]
) -> list[str]:
    """As ``restore``, for an object store: this run's files are made locally and compared, and the
    missing or different ones are written.
    """
    with (
        tempfile.TemporaryDirectory(prefix="dspark-target-") as made,
        place.local(TARGET) as there,
    ):
        mine = Path(made) / TARGET
        write_target(mine, target, manifest.target.config, files)
        wrong = _wrong(there, manifest, files)
        _refuse_other(place.where(""), manifest, mine, wrong)
        for name in wrong:
            place.write(f"{TARGET}/{name}", (mine / name).read_bytes())
    return wrong


def _wrong(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> list[str]:
    """Return the names of files in ``folder`` that are damaged or missing."""
    missing = (n for n in files if not (folder / n).is_file())
    return sorted({*damaged_files(folder, manifest), *missing})


def _refuse_other(path: Where, manifest: Manifest, mine: Path, wrong: Sequence[str]) -> None:
    """Raise MismatchError unless the files of the target in ``mine`` are those of the store."""
    if other := damaged_files(mine, manifest):
        what = f"{', '.join(wrong)} must be written again, but " if wrong else ""
        raise MismatchError(
            f"{path / TARGET}: {what}this run's target is not the one that the store "
            "was started with.\n  "
            + "\n  ".join(text.replace(str(mine), "this run") for text in other.values())
            + f"\n{SAME_TARGET}"
        )
