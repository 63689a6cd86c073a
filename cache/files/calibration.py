"""What a codec has learnt, beside the states: one file per store, hashed into the plan, made by the first writer and read by all others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dspark.cache.codec import registry
from dspark.cache.codec.base import Codec
from dspark.cache.codec.fields import from_fields
from dspark.cache.errors import DamagedCacheError, read_error
from dspark.cache.files.checksum import file_sha256
from dspark.cache.files.layout import CALIBRATION
from dspark.cache.manifest import CodecInfo, Manifest

if TYPE_CHECKING:
    import torch


def codec_info(codec: Codec) -> CodecInfo:
    """What a plan says of ``codec`` before its calibration file is written."""
    return CodecInfo(name=codec.name, params=codec.params, pack=codec.pack)


def save_calibration(codec: Codec, folder: Path) -> str | None:
    """Write what ``codec`` has learnt into ``folder``; returns the file's sha256, None if it has learnt nothing."""
    from safetensors.torch import save_file

    learnt = codec.calibration()
    if not learnt:
        return None
    path = folder / CALIBRATION
    save_file({n: t.detach().cpu().contiguous() for n, t in learnt.items()}, path)
    return file_sha256(path)


def stored_codec(store: Path, manifest: Manifest) -> Codec:
    """The codec of the store at ``store``. Raises DamagedCacheError unless the calibration file is the one that the plan has the hash of."""
    if manifest.fields is not None:
        return from_fields(*manifest.fields, str(store))
    info = manifest.codec
    learnt = {}
    if info.calibration_sha256 is not None:
        learnt = read_calibration(store / CALIBRATION, info.calibration_sha256)
    return registry.load(info.name, info.params, info.pack, learnt, str(store))


def calibrated_by(codec: Codec, path: Path) -> Codec:
    """``codec`` with what the calibration file ``path`` of another store (or writer) holds."""
    return registry.load(codec.name, codec.params, codec.pack, read_calibration(path, None), str(path))


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
        raise DamagedCacheError(f"{path}: the codec's calibration cannot be read: {error}") from error
