"""A codec's calibration, stored beside the states: one file per store, hashed into the plan,
written by the first writer and read by all others.

The file says in its metadata what it was made for, so that it can be taken to another store of the
same plan (``--calibration``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dspark.cache.canonical import canonical, unseal
from dspark.cache.codec import registry
from dspark.cache.codec.base import Codec
from dspark.cache.codec.fields import from_fields
from dspark.cache.errors import (
    DamagedCacheError,
    DsparkError,
    MismatchError,
    UsageError,
    read_error,
)
from dspark.cache.files.atomic import write_file
from dspark.cache.files.checksum import file_sha256
from dspark.cache.files.layout import CALIBRATION, ROOT_KEY
from dspark.cache.files.place import Place, place_of
from dspark.cache.files.urls import Url, Where
from dspark.cache.json_text import Json
from dspark.cache.manifest import CodecInfo, Manifest
from dspark.cache.typed_json import build

if TYPE_CHECKING:
    import torch


def codec_info(codec: Codec) -> CodecInfo:
    """Return what a plan says about ``codec`` before its calibration file is written."""
    return CodecInfo(name=codec.name, params=codec.params, pack=codec.pack)


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeFor:
    """What a calibration was made for. ``config_sha256``: of the target's config, as canonical
    JSON; ``weights_sha256``: of its frozen weights.
    """

    codec: str
    layers: list[int]
    target: str
    config_sha256: str
    weights_sha256: str

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        target = manifest.target
        return cls(
            codec=manifest.codec.name,
            layers=list(manifest.layers),
            target=target.id,
            config_sha256=config_sha256(target.config),
            weights_sha256=target.weights_sha256,
        )


def config_sha256(config: Json) -> str:
    """Return the sha256 of a target's config."""
    return hashlib.sha256(canonical(config)).hexdigest()


@dataclass(frozen=True, slots=True)
class Supplied:
    """A calibration file from another store. ``block_rows``: source rows per part there, and
    ``row_tokens``: tokens per row; None if they are not known.
    """

    path: Path
    sha256: str
    made_for: MadeFor
    block_rows: int | None = None
    row_tokens: float | None = None

    @classmethod
    def read(cls, given: Where) -> Self:
        """Read it, from a file or the store that contains it, without its tensors. Raises
        UsageError if it is not a calibration, DamagedCacheError if its store records another hash.
        """
        flag = f"--calibration {given}"
        try:
            path = _fetched(given) if isinstance(given, Url) else given
            if path.is_dir():
                path /= CALIBRATION
            sha256 = file_sha256(path)
        except OSError as error:
            raise UsageError(f"{flag}: {error.strerror or error}.") from error
        made = _metadata(path, flag)
        manifest = _manifest_beside(given if isinstance(given, Url) else path)
        if manifest is not None and manifest.codec.calibration_sha256 not in (None, sha256):
            raise DamagedCacheError(
                f"{flag}: its sha256 is {sha256}, but the store that contains it says "
                f"{manifest.codec.calibration_sha256}."
            )
        if made is None and manifest is not None:
            made = MadeFor.of(manifest)
        if made is None:
            raise UsageError(
                f"{flag}: does not say what it was made for, because an earlier release wrote "
                "it. Give its path inside its store."
            )
        if manifest is None or manifest.format_version == 1:
            return cls(path, sha256, made)
        tokens = manifest.counts.tokens / max(manifest.counts.rows_read, 1)
        return cls(path, sha256, made, manifest.dump.block_rows, tokens or None)

    def check(self, codec: Codec, layers: Sequence[int], config: Json | None) -> None:
        """Raise MismatchError unless a store of ``codec``, ``layers`` and a target with this
        ``config`` (None = not known yet) can use it.
        """
        made, wrong = self.made_for, []
        if made.codec != codec.name:
            wrong.append(f"codec: it is for {made.codec}, this run has {codec.name}")
        if made.layers != list(layers):
            wrong.append(f"layers: it is for {made.layers}, this run has {list(layers)}")
        if config is not None and made.config_sha256 != config_sha256(config):
            wrong.append(
                f"target: it is for {made.target}, whose config differs from this target's"
            )
        if wrong:
            raise MismatchError(
                f"--calibration {self.path}: not a calibration for this store.\n  "
                + "\n  ".join(wrong)
                + "\nUse the flags that it was made with, or omit --calibration."
            )

    def codec(self, codec: Codec) -> Codec:
        """Return ``codec`` with the file's calibration."""
        learnt = read_calibration(self.path, self.sha256)
        return registry.load(codec.name, codec.params, codec.pack, learnt, str(self.path))


def _fetched(url: Url) -> Path:
    """Return a local copy of a calibration file in an object store, kept by its content."""
    from dspark.cache.files.block_cache import keeping
    from dspark.cache.files.bucket import parent

    place, name = parent(url if url.name.endswith(".safetensors") else url / CALIBRATION)
    data = place.read(name)
    sha256 = hashlib.sha256(data).hexdigest()
    path = place.pieces.folder.with_name("whole") / f"{sha256[:24]}-{CALIBRATION}"
    if not path.exists() or file_sha256(path) != sha256:
        with keeping(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, data)
    return path


def _metadata(path: Path, flag: str) -> MadeFor | None:
    """Return what the file says it was made for; None if it says nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            found: Mapping[str, Any] = file.metadata() or {}
        return build(MadeFor, json.loads(found[ROOT_KEY]), flag) if ROOT_KEY in found else None
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(f"{flag}: not a calibration file of dspark ({error}).") from error


def _manifest_beside(file: Where) -> Manifest | None:
    """Return the manifest of the store that contains ``file``, or of a store at a URL; None if
    there is no readable one.
    """
    if isinstance(file, Path):
        store: Where = file.parent
    else:
        store = Url(file.text.removesuffix(f"/{CALIBRATION}"))
    try:
        # it imports Zarr, which a dry run does not need
        from dspark.cache.files.metadata import read_attributes

        attributes = read_attributes(place_of(store))
        return Manifest.from_json(unseal(attributes.get(ROOT_KEY), str(store)), str(store))
    except DsparkError:
        return None


def save_calibration(codec: Codec, folder: Path, manifest: Manifest) -> str | None:
    """Write the calibration of ``codec`` into ``folder`` of the store of ``manifest``; returns the
    file's sha256, None if there is no calibration.
    """
    from safetensors.torch import save_file

    learnt = codec.calibration()
    if not learnt:
        return None
    path = folder / CALIBRATION
    made = canonical(asdict(MadeFor.of(manifest))).decode()
    save_file({n: t.detach().cpu().contiguous() for n, t in learnt.items()}, path, {ROOT_KEY: made})
    return file_sha256(path)


def stored_codec(store: Place, manifest: Manifest) -> Codec:
    """Return the codec of a store. Raises DamagedCacheError unless the calibration file matches the
    hash in the plan.
    """
    if manifest.fields is not None:
        return from_fields(*manifest.fields, str(store.where("")))
    info = manifest.codec
    learnt = {}
    if info.calibration_sha256 is not None:
        learnt = _stored(store, info.calibration_sha256)
    return registry.load(info.name, info.params, info.pack, learnt, str(store.where("")))


def _stored(store: Place, sha256: str) -> dict[str, torch.Tensor]:
    """Read the calibration of a store, whose plan says ``sha256``."""
    name = store.where(CALIBRATION)
    then = (
        f"No state of this store can be decoded without it. Put the file with the sha256 {sha256} "
        "back, from a copy of this store or from another one with the same plan, or dump again."
    )
    try:
        with store.local_file(CALIBRATION) as path:
            found = file_sha256(path)
            if found == sha256:
                return read_calibration(path, sha256)
    except OSError as error:
        wrong = read_error(name, error)
        raise (
            DamagedCacheError(f"{wrong}. {then}") if isinstance(wrong, DamagedCacheError) else wrong
        ) from error
    raise DamagedCacheError(f"{name}: sha256 is {found}, the plan says {sha256}. {then}")


def read_calibration(path: Path, sha256: str | None) -> dict[str, torch.Tensor]:
    """Read its tensors; ``sha256``: the required hash; None = any."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if sha256 is not None and (found := file_sha256(path)) != sha256:
            raise DamagedCacheError(f"{path}: sha256 is {found}, the plan says {sha256}")
        return dict(load_file(path))
    except OSError as error:
        raise read_error(path, error) from error
    except SafetensorError as error:
        raise DamagedCacheError(
            f"{path}: the codec's calibration cannot be read: {error}"
        ) from error
