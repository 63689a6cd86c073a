"""What a codec has learnt, beside the states: one file per store, hashed into the plan, made by the
first writer and read by all others.

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
from dspark.cache.files.checksum import file_sha256
from dspark.cache.files.layout import CALIBRATION, ROOT_KEY
from dspark.cache.files.place import Place, place_of
from dspark.cache.manifest import CodecInfo, Json, Manifest, build, canonical, unseal

if TYPE_CHECKING:
    import torch


def codec_info(codec: Codec) -> CodecInfo:
    """What a plan says of ``codec`` before its calibration file is written."""
    return CodecInfo(name=codec.name, params=codec.params, pack=codec.pack)


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeFor:
    """What a calibration is of. ``config_sha256``: of the target's config, as canonical JSON;
    ``weights_sha256``: of its frozen weights.
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
    """sha256 of a target's config."""
    return hashlib.sha256(canonical(config)).hexdigest()


@dataclass(frozen=True, slots=True)
class Supplied:
    """A calibration file that was made before, elsewhere."""

    path: Path
    sha256: str
    made_for: MadeFor

    @classmethod
    def read(cls, path: Path) -> Self:
        """Without its tensors. Raises UsageError for what is no calibration, DamagedCacheError for
        one that its store has another hash of.
        """
        flag = f"--calibration {path}"
        try:
            sha256 = file_sha256(path)
        except OSError as error:
            raise UsageError(f"{flag}: {error.strerror or error}.") from error
        made = _metadata(path, flag)
        manifest = _manifest_beside(path)
        if manifest is not None and manifest.codec.calibration_sha256 not in (None, sha256):
            raise DamagedCacheError(
                f"{flag}: its sha256 is {sha256}, the store that it lies in says "
                f"{manifest.codec.calibration_sha256}."
            )
        if made is None and manifest is not None:
            made = MadeFor.of(manifest)
        if made is None:
            raise UsageError(
                f"{flag}: does not say what it was made for, as those of releases before do not. "
                "Give it where it lies in its store."
            )
        return cls(path, sha256, made)

    def check(self, codec: Codec, layers: Sequence[int], config: Json | None) -> None:
        """Raise MismatchError unless a store of ``codec``, ``layers`` and a target with this
        ``config`` (None: not known yet) takes it.
        """
        made, wrong = self.made_for, []
        if made.codec != codec.name:
            wrong.append(f"codec: it is of {made.codec}, this run has {codec.name}")
        if made.layers != list(layers):
            wrong.append(f"layers: it is of {made.layers}, this run has {list(layers)}")
        if config is not None and made.config_sha256 != config_sha256(config):
            wrong.append(
                f"target: it is of {made.target}, whose config is another than this target's"
            )
        if wrong:
            raise MismatchError(
                f"--calibration {self.path}: not a calibration for this store.\n  "
                + "\n  ".join(wrong)
                + "\nGive the flags that it was made with, or leave --calibration out."
            )

    def codec(self, codec: Codec) -> Codec:
        """``codec`` with what the file holds."""
        learnt = read_calibration(self.path, self.sha256)
        return registry.load(codec.name, codec.params, codec.pack, learnt, str(self.path))


def _metadata(path: Path, flag: str) -> MadeFor | None:
    """What the file says that it was made for, None where it says nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            found: Mapping[str, Any] = file.metadata() or {}
        return build(MadeFor, json.loads(found[ROOT_KEY]), flag) if ROOT_KEY in found else None
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(f"{flag}: not a calibration file of dspark ({error}).") from error


def _manifest_beside(path: Path) -> Manifest | None:
    """The manifest of the store that ``path`` lies in, None where it is in none that can be
    read.
    """
    try:
        # Zarr comes with it, and a dry run does without
        from dspark.cache.files.part import read_attributes

        attributes = read_attributes(place_of(path.parent))
        return Manifest.from_json(
            unseal(attributes.get(ROOT_KEY), str(path.parent)), str(path.parent)
        )
    except DsparkError:
        return None


def save_calibration(codec: Codec, folder: Path, manifest: Manifest) -> str | None:
    """Write what ``codec`` has learnt into ``folder`` of the store of ``manifest``; returns the
    file's sha256, None if it has learnt nothing.
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
    """The codec of a store. Raises DamagedCacheError unless the calibration file is the one that
    the plan has the hash of.
    """
    if manifest.fields is not None:
        return from_fields(*manifest.fields, str(store.where("")))
    info = manifest.codec
    learnt = {}
    if info.calibration_sha256 is not None:
        learnt = _stored(store, info.calibration_sha256)
    return registry.load(info.name, info.params, info.pack, learnt, str(store.where("")))


def _stored(store: Place, sha256: str) -> dict[str, torch.Tensor]:
    try:
        with store.local_file(CALIBRATION) as path:
            return read_calibration(path, sha256)
    except OSError as error:
        raise read_error(store.where(CALIBRATION), error) from error


def read_calibration(path: Path, sha256: str | None) -> dict[str, torch.Tensor]:
    """Its tensors; ``sha256``: what the file must have, None: any."""
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
