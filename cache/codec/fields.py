"""Codecs that code the aux layers and the last state separately: ``lossless`` and ``rotated-A-L``
(A and L bits per value).

Each field has its own codec, with arrays ``code`` and ``scale``; a store calls them ``aux_code``,
``last_code`` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from dspark.cache.codec.base import ArraySpec, Tokens, refuse_other_params
from dspark.cache.codec.bf16 import Bf16
from dspark.cache.codec.centre import CALIBRATION, CENTRE_KEYS, Centre
from dspark.cache.codec.rotated import Rotated
from dspark.cache.codec.rotated_tables import NEED_ZSTD, SETTINGS
from dspark.cache.errors import FormatVersionError, UsageError
from dspark.cache.json_text import Json
from dspark.cache.manifest import FieldInfo
from dspark.cache.settings import DEFAULT_PACKING, LOSSLESS, PACKINGS, rotated_bits, rotated_name

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Tensors
    from dspark.cache.repeats import Repeats

FIELDS = ("aux", "last")


class FieldCodec(Protocol):
    """How one field is coded. ``arrays``, ``encode``: names without the field's prefix. ``params``:
    whatever else decoding needs, including calibration.
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def params(self) -> Json: ...
    @property
    def pack(self) -> str: ...
    def arrays(self, hidden: int) -> dict[str, ArraySpec]: ...
    def disk_bytes(self, hidden: int, short: float = 0.0, long: float = 0.0) -> float:
        """Expected bytes of one row on disk; exact if it is not compressed. ``short``, ``long``:
        shares of rows that repeat (``repeats.Repeats``).
        """
        ...

    def encode(self, x: torch.Tensor) -> Tensors: ...
    def decode(
        self, coded: Mapping[str, torch.Tensor], hidden: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Fields:
    """Codes ``aux`` and ``last`` separately."""

    name: str
    aux: FieldCodec
    last: FieldCodec

    @property
    def each(self) -> tuple[tuple[str, FieldCodec], tuple[str, FieldCodec]]:
        return ("aux", self.aux), ("last", self.last)

    @property
    def params(self) -> Json:
        """Codec, bits and parameters per field, without the means and deviations that are in the
        calibration file.
        """
        return {
            field: {"codec": c.name, "bits": c.bits}
            | {k: v for k, v in c.params.items() if k not in CENTRE_KEYS}
            for field, c in self.each
        }

    @property
    def pack(self) -> str:
        return self.aux.pack

    @property
    def bits(self) -> tuple[int | None, int | None]:
        return self.aux.bits, self.last.bits

    @property
    def needs_tokens(self) -> bool:
        return False

    @property
    def needs_calibration(self) -> bool:
        return any(isinstance(c, Rotated) for _, c in self.each)

    def calibration_tokens(self, layers: int, hidden: int) -> int:
        return CALIBRATION if self.needs_calibration else 0

    def least_tokens(self, layers: int, hidden: int) -> int:
        return 0

    def learnt_bytes(self, layers: int, hidden: int) -> int:
        return 0

    def fitting_bytes(self, layers: int, hidden: int, vocab: int) -> int:
        return 0

    def arrays(self, layers: int, hidden: int) -> dict[str, ArraySpec]:
        aux = {
            f"aux_{name}": replace(spec, layers=layers)
            for name, spec in self.aux.arrays(hidden).items()
        }
        last = {
            f"last_{name}": replace(spec, axis="last")
            for name, spec in self.last.arrays(hidden).items()
        }
        return aux | last

    def disk_bytes(
        self, layers: int, hidden: int, last_share: float = 1.0, repeats: Repeats | None = None
    ) -> float:
        short, long, last = repeats or (0.0, 0.0, 0.0)
        aux = self.aux.disk_bytes(hidden, short, long)
        return layers * aux + last_share * self.last.disk_bytes(hidden, 0.0, last)

    def encode(
        self, aux: torch.Tensor, last: torch.Tensor, tokens: Tokens | None = None
    ) -> Tensors:
        out = {f"aux_{name}": t for name, t in self.aux.encode(aux).items()}
        return out | {f"last_{name}": t for name, t in self.last.encode(last).items()}

    def decode(
        self,
        coded: Mapping[str, torch.Tensor],
        hidden: int,
        tokens: Tokens | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        aux = self.aux.decode(of_field("aux", coded), hidden, dtype)
        return aux, self.last.decode(of_field("last", coded), hidden, dtype)

    def calibrated(
        self, aux: torch.Tensor, last: torch.Tensor, tokens: Tokens | None = None
    ) -> Fields:
        return replace(self, aux=calibrated(self.aux, aux), last=calibrated(self.last, last))

    def calibration(self) -> Tensors:
        out: Tensors = {}
        for field, codec in self.each:
            if isinstance(codec, Rotated) and codec.centre is not None:
                out |= {f"{field}_{k}": t for k, t in codec.centre.stored().items()}
        return out

    def repacked(self, pack: str) -> Fields:
        aux, last = (codec_for(c.bits, pack) for _, c in self.each)
        return replace(self, aux=_with_centre(aux, self.aux), last=_with_centre(last, self.last))


def of_field(field: str, coded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of ``field`` under the names that its codec uses."""
    return {
        name.removeprefix(f"{field}_"): x
        for name, x in coded.items()
        if name.startswith(f"{field}_")
    }


def _with_centre(codec: FieldCodec, like: FieldCodec) -> FieldCodec:
    if isinstance(codec, Rotated) and isinstance(like, Rotated):
        return replace(codec, centre=like.centre)
    return codec


def calibrated(codec: FieldCodec, states: torch.Tensor) -> FieldCodec:
    """Return ``codec`` centred on ``states`` [T, L, H] or [M, H], if it supports that and there are
    any.
    """
    return codec.calibrated(states) if isinstance(codec, Rotated) and states.shape[0] else codec


def codec_for(bits: int, pack: str = DEFAULT_PACKING) -> FieldCodec:
    """Return the codec of one field that stores ``bits`` per value."""
    assert pack in PACKINGS, pack
    if bits == 16:
        return Bf16(pack=pack)
    if bits not in SETTINGS:
        raise UsageError(f"no codec stores {bits} bits; choose 16, 8, 4, 3 or 2")
    if pack == "none" and bits in NEED_ZSTD:
        raise UsageError(
            f"{bits}-bit codes are stored as nibbles, and only zstd makes them smaller. Without "
            "zstd (--pack none), choose 16, 8 or 4 bits, or leave --pack at zstd"
        )
    step, levels = SETTINGS[bits]
    return Rotated(bits, step, levels, pack=pack)


# -- what a store records --------------------------------------------------------------------------


def from_fields(aux: FieldInfo, last: FieldInfo, where: str) -> Fields:
    """Return the codec of a store of format version 1, whose manifest describes each field
    separately.
    """
    return Fields(
        rotated_name(aux.bits, last.bits), field_codec(aux, where), field_codec(last, where)
    )


def field_codec(info: FieldInfo, where: str) -> FieldCodec:
    """Return the codec of a field as a version 1 manifest describes it; refuse one that this
    release would not have written.
    """
    if info.pack not in PACKINGS or (info.pack == "none" and info.bits in NEED_ZSTD):
        raise FormatVersionError(
            f"{where}: {info.bits}-bit states are packed with {info.pack!r}, this release knows "
            f"{' and '.join(PACKINGS)} (3 and 2 bits: zstd). Use the dspark release that "
            "wrote the store."
        )
    known = codec_for(info.bits, info.pack) if info.bits == 16 or info.bits in SETTINGS else None
    if isinstance(known, Rotated) and set(info.params) >= CENTRE_KEYS:
        known = replace(known, centre=Centre.from_json(info.params, where))
    if known is None or (known.name, known.params) != (info.codec, dict(info.params)):
        mine = f"{known.name!r} {known.params}" if known else f"only {sorted([16, *SETTINGS])} bits"
        raise FormatVersionError(
            f"{where}: states are coded as {info.codec!r} {info.params}, this release knows "
            f"{mine} for {info.bits} bits. "
            "Use the dspark release that wrote the store."
        )
    return known


def field_info(codec: FieldCodec) -> FieldInfo:
    """Return what a version 1 manifest says about a field that ``codec`` codes."""
    return FieldInfo(codec=codec.name, bits=codec.bits, params=codec.params, pack=codec.pack)


class FieldsFamily:
    """``lossless`` and ``rotated-A-L``."""

    def names(self) -> list[str]:
        bits = (16, *SETTINGS)
        return [LOSSLESS, *(rotated_name(a, b) for a in bits for b in bits if (a, b) != (16, 16))]

    def make(self, name: str, pack: str) -> Fields:
        bits = rotated_bits(name)
        if bits is None:
            raise UsageError(
                f"--codec {name}: expected {LOSSLESS} or rotated-A-L, such as rotated-4-4"
            )
        return Fields(name, *(codec_for(b, pack) for b in bits))

    def load(
        self,
        name: str,
        params: Json,
        pack: str,
        calibration: Mapping[str, torch.Tensor],
        where: str,
    ) -> Fields:
        known = self.make(name, pack)
        refuse_other_params(known, params, where)
        centres = {
            field: Centre.from_tensors(of_field(field, calibration), where)
            for field in FIELDS
            if of_field(field, calibration)
        }
        aux, last = (
            replace(c, centre=centres[field]) if isinstance(c, Rotated) and field in centres else c
            for field, c in known.each
        )
        return replace(known, aux=aux, last=last)


FAMILY = FieldsFamily()
