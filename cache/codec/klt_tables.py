"""What the transform codec knows of a target and its corpus: one ``Transform`` for the aux layers and one for the last state.

A transform predicts a row x from features f that the decoder has too, and quantises what is left in a basis with one step:

    encoder    y = ((x - mean) / deviation) @ forward - f @ predict @ forward,   q = y / step, rounded
    decoder    x = mean + deviation * (y' @ back + f @ predict),                 y' = mean of y in the cell q

The file is a safetensors file, named by its sha256 in the manifest.

Legend: C channels of a row (L * H or H), K coefficients kept, F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.codec.klt_symbols import CLASSES, Packing, band_count
from dspark.cache.errors import DamagedCacheError

if TYPE_CHECKING:
    import torch

VERSION = "1"


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """``mean``, ``deviation`` float32 [C]; ``back`` bfloat16 [K, C]; ``forward`` bfloat16 [C, K], None where it is ``back`` transposed;
    ``predict`` bfloat16 [F, C]; ``offsets`` float32 [2, bands] (``klt_symbols.value_table``).

    ``limit``: a row whose cells would have to be moved by more than this (squared, in sum) to fit their classes is stored exactly.
    ``noise``: mean squared error of an ordinary row's coefficients, in sum. ``bits``: of a row, by entropy, on tokens that were held out.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    back: torch.Tensor
    forward: torch.Tensor | None
    predict: torch.Tensor
    offsets: torch.Tensor
    step: float
    packing: Packing
    limit: float
    noise: float
    bits: float

    @property
    def channels(self) -> int:
        return int(self.back.shape[1])

    @property
    def kept(self) -> int:
        return int(self.back.shape[0])

    def numbers(self) -> dict[str, Any]:
        """What is not a tensor."""
        names = ("step", "limit", "noise", "bits")
        return {"columns": list(self.packing.columns), **{n: getattr(self, n) for n in names}}

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ("mean", "deviation", "back", "forward", "predict", "offsets")
        found = {n: getattr(self, n) for n in names}
        return {n: t.contiguous().cpu() for n, t in found.items() if t is not None}


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Both transforms. ``context``: how many of the first aux coefficients the last state is predicted from."""

    aux: Transform
    last: Transform
    layers: int
    hidden: int
    context: int

    def to_bytes(self) -> bytes:
        """The calibration file; equal tables make equal bytes."""
        from safetensors.torch import save

        named = {f"{f}.{n}": t for f in ("aux", "last") for n, t in getattr(self, f).tensors().items()}
        about = {
            "layers": self.layers, "hidden": self.hidden, "context": self.context, "classes": CLASSES,
            "aux": self.aux.numbers(), "last": self.last.numbers(),
        }  # fmt: skip
        metadata = {"dspark_klt": VERSION, "about": json.dumps(about, sort_keys=True)}
        return bytes(save(named, metadata))

    @classmethod
    def load(cls, path: Path, sha256: str) -> Tables:
        """Read the file at ``path``. Raises DamagedCacheError unless it is the one that ``sha256`` names."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DamagedCacheError(f"{path}: {error.strerror}") from error
        found = hashlib.sha256(raw).hexdigest()
        if found != sha256:
            raise DamagedCacheError(f"{path}: sha256 is {found}, the manifest says {sha256}")
        return cls.from_bytes(raw, str(path))

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Tables:
        from safetensors.torch import load

        size = int.from_bytes(raw[:8], "little")
        try:
            metadata = json.loads(raw[8 : 8 + size])["__metadata__"]
            version, about = metadata["dspark_klt"], json.loads(metadata["about"])
            tensors = load(raw)
        except Exception as error:  # safetensors has an error type of its own for every fault
            raise DamagedCacheError(f"{where}: not a calibration file: {error}") from error
        classes = [list(c) for c in CLASSES]
        if version != VERSION or about["classes"] != classes:
            raise DamagedCacheError(
                f"{where}: found version {version} with classes {about['classes']}, "
                f"this release reads version {VERSION} with {classes}"
            )
        fields = {f: _transform(about[f], tensors, f, where) for f in ("aux", "last")}
        return cls(fields["aux"], fields["last"], about["layers"], about["hidden"], about["context"])


def _transform(about: Mapping[str, Any], tensors: Mapping[str, Any], field: str, where: str) -> Transform:
    """One transform, its shapes checked against each other."""
    own: dict[str, Any] = {
        n.removeprefix(f"{field}."): t for n, t in tensors.items() if n.startswith(f"{field}.")
    }
    numbers: dict[str, Any] = {n: float(about[n]) for n in ("step", "limit", "noise", "bits")}
    packing = Packing(tuple(about["columns"]))
    out = Transform(packing=packing, **{"forward": None, **own}, **numbers)
    k, c = out.kept, out.channels
    expected = {
        "mean": (c,), "deviation": (c,), "back": (k, c), "forward": (c, k), "predict": (out.predict.shape[0], c),
        "offsets": (2, band_count(packing)),
    }  # fmt: skip
    wrong = [
        f"{n} {tuple(t.shape)}, expected {expected[n]}"
        for n, t in own.items()
        if tuple(t.shape) != expected[n]
    ]
    if wrong or packing.total != k:
        raise DamagedCacheError(f"{where}: {field}: {wrong or f'{packing.total} columns, expected {k}'}")
    return out
