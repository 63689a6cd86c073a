"""Codecs: hidden states -> the arrays that are stored, and back, on whatever device the tensor is.

A codec is a frozen dataclass. ``encode`` takes a float tensor ``[..., H]`` and returns torch tensors (name -> ``[..., W]``)
on the same device, so that a dump encodes where the states are and only codes leave the device. ``decode`` is its inverse up to the stated
error, also on any device, so that a trainer moves codes and decodes on the GPU. What a codec stores on disk is plain
Zarr arrays ``{field}_{name}``; docs/format.md specifies each, and golden-byte tests hold them.

Every codec is pure arithmetic on one token row: no state from one token to another, so any row can be read alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dspark.cache.codec.centre import CENTRE_KEYS, Centre
from dspark.cache.codec.quant import SCALE_ZERO, UNIT, distortion, entropy, level_table, scale_table
from dspark.cache.codec.rotation import GROUP_LEAST, energy, group_size, rotate, signs, unrotation
from dspark.cache.errors import EngineError, FormatVersionError, UsageError
from dspark.cache.manifest import FieldInfo, Json
from dspark.cache.settings import DEFAULT_PACKING, PACKINGS

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

Table = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
GROUP_LIMIT = 128
SQUARE_LIMIT = 2.0**63  # (rms / sqrt(g))^2 of a group at the largest scale code
LOSSLESS_BITS = 12.4  # measured: bfloat16 states of SmolLM2-135M, byte shuffle and zstd level 3
SCALE_BITS = 3.1  # measured on the same states: zstd of the scale codes, 8 bits each before
HUFFMAN_EXCESS = 0.03  # measured: bits a value that zstd level 1 needs above the entropy of the cells


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One stored array of a codec: numpy dtype, the width of a row's last axis, and how it is kept (``settings.PACKINGS``)."""

    dtype: str
    width: int
    pack: str = DEFAULT_PACKING

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize) * self.width


class Codec(Protocol):
    """``name`` and ``bits`` identify it in a manifest, ``params`` holds whatever else decoding needs; ``pack`` says how its arrays are kept.

    ``disk_bytes``: expected bytes of one row on disk, after the chunks' lossless compression; exact if there is none. ``decode`` gives ``dtype``, or without one the
    narrowest that holds what was stored.
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
    def disk_bytes(self, hidden: int) -> float: ...
    def encode(self, x: torch.Tensor) -> Tensors: ...
    def decode(
        self, coded: Mapping[str, torch.Tensor], hidden: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Bf16:
    """16 bits: the bfloat16 bits of each value. Lossless for a bfloat16 target; a float32 state is rounded to nearest even."""

    name: str = "bf16"
    bits: int = 16
    pack: str = DEFAULT_PACKING

    @property
    def params(self) -> Json:
        return {}

    def disk_bytes(self, hidden: int) -> float:
        return hidden * (LOSSLESS_BITS if self.pack == "zstd" else 16) / 8

    def arrays(self, hidden: int) -> dict[str, ArraySpec]:
        return {"code": ArraySpec("uint16", hidden, self.pack)}

    def encode(self, x: torch.Tensor) -> Tensors:
        import torch

        check_finite(x)
        return {"code": x.to(torch.bfloat16).contiguous().view(torch.uint16)}

    def decode(
        self, coded: Mapping[str, torch.Tensor], hidden: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        import torch

        return coded["code"].view(torch.bfloat16).to(dtype or torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Rotated:
    """Groups of g channels are rotated (``rotation.py``), divided by one scale and put into 16 or 256 cells a value.

    ``bits`` is what a value takes on disk, nearly: nibbles are stored and zstd's Huffman stage takes out what the cells' unequal
    shares leave over. So a coarser ``step`` is a smaller store with the same arrays and the same decoder, at 1.5 dB from the Gaussian bound,
    where packing a fixed 3 or 2 bits is 2.5 dB from it.

    ``centre``: channel means and deviations taken out before and put back after; see ``centre.py``.
    ``step``: cell width in sigma (encoder only). ``levels``: integers in 1/64 sigma, positive half (decoder only).
    Stored: ``code`` uint8 (two values a byte, the even channel low; or one), ``scale`` uint8 a group, 2^((k - 128) / 4).
    """

    bits: int
    step: float
    levels: tuple[int, ...]
    group_limit: int = GROUP_LIMIT
    centre: Centre | None = None
    name: str = "rotated"
    pack: str = DEFAULT_PACKING

    @property
    def params(self) -> Json:
        base = {"group_limit": self.group_limit, "step": self.step, "levels": list(self.levels)}
        return {**base, **(self.centre.to_json() if self.centre else {})}

    def calibrated(self, states: torch.Tensor) -> Rotated:
        """This codec with the channel means and deviations of ``states[T, L, H]`` or ``[M, H]``, a sample of what it will code."""
        return replace(self, centre=Centre.of(states))

    @property
    def per_byte(self) -> int:
        return 2 if len(self.levels) == 8 else 1

    def group(self, hidden: int) -> int:
        g = group_size(hidden, self.group_limit)
        if g < GROUP_LEAST:
            raise UsageError(
                f"hidden size {hidden} is not a multiple of {GROUP_LEAST}, which {self.bits} bits need; choose 16 bits"
            )
        return g

    def arrays(self, hidden: int) -> dict[str, ArraySpec]:
        return {
            "code": ArraySpec("uint8", hidden // self.per_byte, self.pack),
            "scale": ArraySpec("uint8", hidden // self.group(hidden), self.pack),
        }

    def disk_bytes(self, hidden: int) -> float:
        if self.pack == "none":
            return sum(s.row_bytes for s in self.arrays(hidden).values())
        bits = hidden * (entropy(self.step, 2 * len(self.levels)) + HUFFMAN_EXCESS)
        return (bits + hidden / self.group(hidden) * SCALE_BITS) / 8

    def encode(self, x: torch.Tensor) -> Tensors:
        """On CUDA Triton kernels (``fused_encode.py``), with the same bytes as ``encode_plain``."""
        if x.is_cuda and _has_triton():
            from dspark.cache.codec import rotated_encode_kernel as fused_encode

            hidden = x.shape[-1]
            if self.group(hidden) >= fused_encode.LEAST_GROUP and fused_encode.trusted(
                self, hidden, x.device, x.dtype
            ):
                return fused_encode.encode(self, x)
        return self.encode_plain(x)

    def encode_plain(self, x: torch.Tensor) -> Tensors:
        """The encoder in plain torch, on any device. The reference."""
        import torch

        hidden = x.shape[-1]
        g = self.group(hidden)
        z = x.detach()
        if self.centre:
            mean, _, inverse = self.centre.tensors(hidden, x.device)
            z = (z.float() - mean) * inverse
        groups = z.reshape(-1, g)
        # A block of groups goes through all passes while it is in the processor's cache; a GPU only needs its memory bounded.
        size = (1 << 18 if x.device.type == "cpu" else 1 << 26) // g
        empty = torch.empty(0, dtype=torch.uint8, device=x.device)
        codes, scales = [empty], [empty]
        for block in torch.split(groups, size) if groups.shape[0] else ():
            code, scale = self._encode_block(block.float(), x)
            codes.append(code.flatten())
            scales.append(scale)
        lead = x.shape[:-1]
        return {
            "code": torch.cat(codes).view(*lead, hidden // self.per_byte),
            "scale": torch.cat(scales).view(*lead, hidden // g),
        }

    def _encode_block(self, groups: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Code uint8[N, bytes a group] and scale uint8[N] of centred float32 ``groups[N, g]``; ``whole``: the states they are of, for messages."""
        import torch

        g = groups.shape[1]
        columns = groups.t().contiguous()
        squares = energy(columns).div_(g * g)
        if not bool((squares <= SQUARE_LIMIT).all()):
            self.refuse(whole)
        cells, k = self._quantise(rotate(columns, _constant(groups.device, signs, g)), squares, g)
        code = cells.to(torch.uint8).t()
        if self.per_byte == 2:
            code = code[:, 0::2] | (code[:, 1::2] << 4)
        return code, k.to(torch.uint8)

    def refuse(self, x: torch.Tensor) -> None:
        """Say what in ``x`` cannot be coded."""
        check_finite(x)
        _refuse_huge(x)

    def _quantise(self, y: torch.Tensor, squares: torch.Tensor, g: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells (float32[g, N], counted from 0) and scale codes (int32[N]) of rotated groups ``y[g, N]``.

        The scale is the group's RMS. A group that is far from Gaussian (one massive channel rotates into coefficients that are all
        plus or minus sigma, in the middle of a wide cell; a row of the transform itself into one spike) is tried at other scales.
        """
        import torch

        k = _scale_code(squares)
        cells, error = self._cells(y, k, g)
        bad = (error > 2.0 * distortion(self.step, self.levels) * squares * g).nonzero()[:, 0]
        if bad.numel():
            few, first = y.index_select(1, bad), k.index_select(0, bad)
            best, best_error, best_k = cells.index_select(1, bad), error.index_select(0, bad), first
            for offset in (-4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8):
                at = (first + offset).clamp_(1, 255)
                tried, e = self._cells(few, at, g)
                better = e < best_error
                best = torch.where(better, tried, best)
                best_error = torch.where(better, e, best_error)
                best_k = torch.where(better, at, best_k)
            cells.index_copy_(1, bad, best)
            k.index_copy_(0, bad, best_k)
        return cells, k

    def _cells(self, y: torch.Tensor, k: torch.Tensor, g: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells of ``y[g, N]`` at scale codes ``k[N]``, and the mean squared error of a group over g^2, float32[N]."""
        import torch

        half = len(self.levels)
        t = y * _constant(y.device, cells_per_unit, self.step, g).index_select(0, k)
        cells = t.floor().clamp_(-half, half - 1).add_(half)
        levels = _constant(y.device, levels_in_cells, self.step, self.levels)
        t -= levels.index_select(0, cells.to(torch.int32).view(-1)).view(t.shape)
        scale = _constant(y.device, scale_table).index_select(0, k) * self.step
        return cells, energy(t) * scale * scale

    def decode(
        self, coded: Mapping[str, torch.Tensor], hidden: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """``dtype``: float32 if not given. On CUDA one kernel (``fused.py``), with the same bits as ``decode_plain``."""
        import torch

        dtype = dtype or torch.float32
        if coded["code"].is_cuda and _has_triton():
            from dspark.cache.codec import rotated_decode_kernel as fused

            if self.group(hidden) >= fused.LEAST_GROUP:
                return fused.decode(self, coded, hidden, dtype)
        return self.decode_plain(coded, hidden).to(dtype)

    def decode_plain(self, coded: Mapping[str, torch.Tensor], hidden: int) -> torch.Tensor:
        """The decoder in plain torch, on any device: float32 [..., H]. The reference."""
        import torch

        g = self.group(hidden)
        code, scale = coded["code"], coded["scale"]
        device = code.device
        pairs = _constant(device, _byte_levels, self.levels)
        scales = _constant(device, _scale_over_unit)
        back = _constant(device, unrotation, g)
        out = torch.empty(scale.numel(), g, dtype=torch.float32, device=device)
        flat, k = code.reshape(-1, g // self.per_byte), scale.reshape(-1).to(torch.int32)
        size = (1 << 18 if device.type == "cpu" else 1 << 26) // g
        # Autocast would round the product to 16 bits. Its terms are small integers: exact in float32 (and TF32) in any order.
        with torch.autocast(device.type, enabled=False):
            for block, to, s in zip(
                torch.split(flat, size), torch.split(out, size), torch.split(k, size), strict=True
            ):
                levels = pairs.index_select(0, block.reshape(-1).to(torch.int32)).view(-1, g)
                torch.mm(levels, back, out=to)
                to.mul_(scales.index_select(0, s)[:, None])
        y = out.view(*code.shape[:-1], hidden)
        if self.centre:
            mean, deviation, _ = self.centre.tensors(hidden, device)
            y.mul_(deviation).add_(mean)
        return y


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_finite(x: torch.Tensor) -> None:
    """Refuse NaN and infinity, naming the first row (and layer) that has one."""
    import torch

    if bool(torch.isfinite(x).all()):
        return
    first = (~torch.isfinite(x)).nonzero()[0].tolist()
    raise EngineError(
        f"hidden state is not finite at {_where(first)}: found {float(x[tuple(first)])}, expected a finite value. "
        "Run the target in bfloat16 or float32 (float16 overflows on massive activations)."
    )


def _refuse_huge(x: torch.Tensor) -> None:
    first = (x.abs() == x.abs().max()).nonzero()[0].tolist()
    raise EngineError(
        f"hidden state is too large for this codec at {_where(first)}: found {float(x[tuple(first)])}, expected below 1e9. "
        "Real states stay below 1e6: check the target, or store 16 bits."
    )


def _where(index: list[int]) -> str:
    layer = f", aux layer number {index[1]}" if len(index) == 3 else " (last state)"
    return f"token {index[0]}{layer}, channel {index[-1]}"


def _scale_code(squares: torch.Tensor) -> torch.Tensor:
    """Scale code int32[N], 0-255, of each group from ``(rms / sqrt(g))^2``: nearest quarter octave, from exponent and mantissa alone."""
    import torch

    m, e = torch.frexp(squares)
    quarter = (m >= 2.0**-0.75).to(torch.int32) + (m >= 2.0**-0.25).to(torch.int32)
    k = 2 * e.to(torch.int32) + (SCALE_ZERO - 2) + quarter
    return torch.where((squares > 0) & (k > 0), k, torch.zeros_like(k))


@lru_cache(maxsize=64)
def _constant(device: torch.device, make: Callable[..., Table], *args: Hashable) -> torch.Tensor:
    """``make(*args)`` on ``device``, made once; usable outside inference mode whoever asks first."""
    import torch

    with torch.inference_mode(False):
        return torch.from_numpy(make(*args)).to(device)


def cells_per_unit(step: float, g: int) -> Table:
    """1 / (g scale step) of each scale code, float32[256]: turns an unnormalised rotation into cells; 0 for code 0."""
    scale = scale_table().astype(np.float64)
    return np.divide(1.0, scale * (g * step), out=np.zeros(256), where=scale > 0).astype(np.float32)


def levels_in_cells(step: float, levels: tuple[int, ...]) -> Table:
    return (level_table(levels) / (UNIT * step)).astype(np.float32)


def _byte_levels(levels: tuple[int, ...]) -> Table:
    """Levels of the values in each byte, float32[256, values a byte]."""
    table = level_table(levels)
    if table.shape[0] == 256:
        return table[:, None]
    return np.stack([np.tile(table, 16), np.repeat(table, 16)], axis=1)


def _scale_over_unit() -> Table:
    return scale_table() / np.float32(UNIT)


# By bits: cell width in sigma and levels in 1/64 sigma (``gaussian_levels(step, 16)``, written out because they are the format).
SETTINGS: dict[int, tuple[float, tuple[int, ...]]] = {
    8: (0.03125, tuple(range(1, 256, 2))),
    4: (0.4, (13, 38, 63, 88, 114, 139, 164, 198)),
    3: (0.6, (19, 56, 93, 131, 168, 205, 243, 282)),
    2: (1.1, (32, 96, 161, 227, 294, 362, 432, 528)),
}


NEED_ZSTD = (3, 2)  # bits whose cells are stored in more than they hold


def codec_for(bits: int, pack: str = DEFAULT_PACKING) -> Codec:
    """The codec that ``--aux-bits`` / ``--last-bits`` and ``--pack`` name."""
    assert pack in PACKINGS, pack
    if bits == 16:
        return Bf16(pack=pack)
    if bits not in SETTINGS:
        raise UsageError(f"no codec stores {bits} bits; choose 16, 8, 4, 3 or 2")
    if pack == "none" and bits in NEED_ZSTD:
        raise UsageError(
            f"{bits} bits are coarser cells in the nibbles of 4 bits, and only zstd makes them smaller: "
            "without it (--pack none) choose 16, 8 or 4 bits, or leave --pack at zstd"
        )
    step, levels = SETTINGS[bits]
    return Rotated(bits, step, levels, pack=pack)


def codec_from(info: FieldInfo, where: str) -> Codec:
    """The codec that a manifest's field names; one that this release would not have written is refused."""
    if info.pack not in PACKINGS or (info.pack == "none" and info.bits in NEED_ZSTD):
        raise FormatVersionError(
            f"{where}: {info.bits}-bit states are packed by {info.pack!r}, this release knows {' and '.join(PACKINGS)} (3 and 2 bits: zstd). "
            "Use the dspark release that wrote the store."
        )
    known = codec_for(info.bits, info.pack) if info.bits == 16 or info.bits in SETTINGS else None
    if isinstance(known, Rotated) and set(info.params) >= CENTRE_KEYS:
        known = replace(known, centre=Centre.from_json(info.params, where))
    if known is None or (known.name, known.params) != (info.codec, dict(info.params)):
        mine = f"{known.name!r} {known.params}" if known else f"only {sorted([16, *SETTINGS])} bits"
        raise FormatVersionError(
            f"{where}: states are coded as {info.codec!r} {info.params}, this release knows {mine} for {info.bits} bits. "
            "Use the dspark release that wrote the store."
        )
    return known


def calibrated(codec: Codec, states: torch.Tensor) -> Codec:
    """``codec`` centred on ``states`` [T, L, H] or [M, H], if it is one that can be and there are any."""
    return codec.calibrated(states) if isinstance(codec, Rotated) and states.shape[0] else codec


def field_info(codec: Codec) -> FieldInfo:
    """What a manifest says of a field that ``codec`` codes."""
    return FieldInfo(codec=codec.name, bits=codec.bits, params=codec.params, pack=codec.pack)


def to_numpy(
    coded: Mapping[str, torch.Tensor],
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Codes on any device -> numpy arrays on the host (bit-exact)."""
    return {name: t.cpu().numpy() for name, t in coded.items()}
