"""Codecs: hidden states -> the arrays that are stored, and back, on whatever device the tensor is.

A codec is a frozen dataclass. ``encode`` takes a float tensor ``[..., H]`` and returns torch tensors (name -> ``[..., W]``)
on the same device, so that a dump encodes where the states are and only codes leave the device. ``decode`` is its inverse up to the stated
error, also on any device, so that a trainer moves codes and decodes on the GPU. What a codec stores on disk is plain
Zarr arrays ``{field}_{name}``; docs/format.md specifies each, and golden-byte tests hold them.

Every codec is pure arithmetic on one token row: no state from one token to another, so any row can be read alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dspark.cache.errors import EngineError, FormatVersionError, UsageError
from dspark.cache.manifest import FieldInfo

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One stored array of a codec: numpy dtype and the width of a row's last axis."""

    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize) * self.width


class Codec(Protocol):
    """``name`` and ``bits`` identify it in a manifest, ``params`` holds whatever else decoding needs."""

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    def arrays(self, hidden: int) -> dict[str, ArraySpec]: ...
    def encode(self, x: torch.Tensor) -> Tensors: ...
    def decode(self, coded: Mapping[str, torch.Tensor], hidden: int) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Bf16:
    """16 bits: the bfloat16 bits of each value. Lossless for a bfloat16 target; a float32 state is rounded to nearest even."""

    name: str = "bf16"
    bits: int = 16

    def arrays(self, hidden: int) -> dict[str, ArraySpec]:
        return {"code": ArraySpec("uint16", hidden)}

    def encode(self, x: torch.Tensor) -> Tensors:
        import torch

        check_finite(x)
        return {"code": x.to(torch.bfloat16).contiguous().view(torch.uint16)}

    def decode(self, coded: Mapping[str, torch.Tensor], hidden: int) -> torch.Tensor:
        import torch

        return coded["code"].view(torch.bfloat16)


def check_finite(x: torch.Tensor) -> None:
    """Refuse NaN and infinity, naming the first row (and layer) that has one."""
    import torch

    if bool(torch.isfinite(x).all()):
        return
    first = (~torch.isfinite(x)).nonzero()[0].tolist()
    where = f"token {first[0]}" + (f", aux layer number {first[1]}" if len(first) == 3 else " (last state)")
    raise EngineError(
        f"hidden state is not finite at {where}, channel {first[-1]}: found {float(x[tuple(first)])}, expected a finite value. "
        "Run the target in bfloat16 or float32 (float16 overflows on massive activations)."
    )


def codec_for(bits: int) -> Codec:
    """The codec that ``--aux-bits`` / ``--last-bits`` name."""
    if bits == 16:
        return Bf16()
    raise UsageError(f"no codec stores {bits} bits; choose 16")


def codec_from(info: FieldInfo, where: str) -> Codec:
    """The codec that a manifest's field names; a name this release does not know is refused."""
    codec = codec_for(info.bits)
    if (codec.name, dict(info.params)) != (info.codec, {}):
        raise FormatVersionError(
            f"{where}: states are coded as {info.codec!r} {info.params}, this release knows {codec.name!r} for {info.bits} bits. "
            "Use the dspark release that wrote the store."
        )
    return codec


def to_numpy(
    coded: Mapping[str, torch.Tensor],
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Codes on any device -> numpy arrays on the host (bit-exact)."""
    return {name: t.cpu().numpy() for name, t in coded.items()}
