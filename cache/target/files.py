"""``target/``: the target's files beside the states, and those whose damage the manifest can
detect: ``model.safetensors``, ``tokenizer.json`` and ``chat_template.jinja`` (if chats were
rendered), by their sha256, and ``config.json``, which the manifest contains. The other tokenizer
files are stored unchecked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from dspark.cache import json_text
from dspark.cache.errors import GONE, DamagedCacheError, read_error, reading
from dspark.cache.files.checksum import file_sha256
from dspark.cache.files.layout import (
    TARGET_CONFIG,
    TARGET_TEMPLATE,
    TARGET_TOKENIZER,
    TARGET_WEIGHTS,
)
from dspark.cache.manifest import Manifest
from dspark.cache.target.frozen import FrozenTarget


def write_target(
    folder: Path, target: FrozenTarget, config: Mapping[str, object], files: Mapping[str, bytes]
) -> str:
    """Fill the new ``folder``; returns the sha256 of the weights. The caller commits."""
    folder.mkdir(parents=True)
    sha = target.save(folder / TARGET_WEIGHTS)
    (folder / TARGET_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return sha


def damaged_files(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return name -> finding for every file of ``folder`` that does not match the manifest. Reads
    the weights once, at the speed of sha256.
    """
    out = damaged_small_files(folder, manifest)
    if finding := _wrong_hash(folder / TARGET_WEIGHTS, manifest.target.weights_sha256):
        out[TARGET_WEIGHTS] = finding
    return out


def damaged_small_files(folder: Path, manifest: Manifest) -> dict[str, str]:
    """``damaged_files`` without the weights."""
    out = {}
    sha = manifest.tokenizer.sha256
    if sha is not None and (finding := _wrong_hash(folder / TARGET_TOKENIZER, sha)):
        out[TARGET_TOKENIZER] = finding
    if finding := _wrong_template(
        folder / TARGET_TEMPLATE, manifest.tokenizer.chat_template_sha256
    ):
        out[TARGET_TEMPLATE] = finding
    config = folder / TARGET_CONFIG
    try:
        if json_text.read(config) != manifest.target.config:
            out[TARGET_CONFIG] = f"{config}: differs from the config in the manifest"
    except OSError as error:
        if error.errno not in GONE:
            raise read_error(config, error) from error
        out[TARGET_CONFIG] = f"{config}: {error.strerror}"
    except ValueError as error:
        out[TARGET_CONFIG] = f"{config}: not JSON: {error}"
    return out


def small_files(folder: Path, manifest: Manifest, store: object) -> dict[str, bytes]:
    """Read the tokenizer's files in ``folder`` of ``store``, for another store of the same target.
    Raises DamagedCacheError unless they match the manifest.
    """
    for finding in damaged_small_files(folder, manifest).values():
        raise DamagedCacheError(f"{finding}. {what_to_do(store)}")
    return {
        p.name: p.read_bytes()
        for p in sorted(folder.iterdir())
        if p.name not in (TARGET_WEIGHTS, TARGET_CONFIG)
    }


def what_to_do(store: object) -> str:
    """Return the next step after a finding in ``target/``."""
    return (
        f"Run dspark-tools verify --drop-damaged {store}, then the command that wrote the store "
        "with --resume, which restores what is missing."
    )


def _wrong_hash(path: Path, expected: str) -> str | None:
    try:
        found = file_sha256(path)
    except OSError as error:
        if error.errno not in GONE:
            raise read_error(path, error) from error
        return f"{path}: {error.strerror}"
    return None if found == expected else f"{path}: sha256 is {found}, the manifest says {expected}"


def _wrong_template(path: Path, expected: str | None) -> str | None:
    """Compare the template. None also if there is no such file: a target may keep its template in
    tokenizer_config.json.
    """
    if expected is None:
        return None
    try:
        with reading(path):
            if not path.exists():
                return None
            found = hashlib.sha256(
                path.read_text("utf-8").encode()
            ).hexdigest()  # of the text, as it was rendered
    except UnicodeDecodeError as error:
        return f"{path}: {error}"
    return None if found == expected else f"{path}: sha256 is {found}, the manifest says {expected}"
