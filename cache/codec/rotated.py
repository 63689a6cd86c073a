"""Rotated groups in a few cells per value: 8, 4, 3 or 2 bits. Pure arithmetic on one token row,
with no dependence between tokens, so any row can be read alone. docs/format.md specifies the
arrays, and golden-byte tests check them.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from dspark.cache.codec.base import ArraySpec
from dspark.cache.codec.centre import Centre
from dspark.cache.codec.quant import SCALE_ZERO, distortion, entropy, scale_table
from dspark.cache.codec.rotated_tables import (
    GROUP_LIMIT,
    SQUARE_LIMIT,
    Table,
    byte_levels,
    cells_per_unit,
    levels_in_cells,
    scale_over_unit,
)
from dspark.cache.codec.rotation import GROUP_LEAST, energy, group_size, rotate, signs, unrotation
from dspark.cache.codec.state_errors import StateError, check_finite
from dspark.cache.errors import UsageError
from dspark.cache.json_text import Json
from dspark.cache.settings import DEFAULT_PACKING

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Tensors

log = logging.getLogger("dspark.cache")
# measured on SmolLM2-135M's states: zstd of the scale codes, 8 bits each before
SCALE_BITS = 2.5
# measured: bits per value that zstd level 1 needs above the entropy of the cells
HUFFMAN_EXCESS = 0.03
# By bits: the share of a row's code that zstd finds in its chunk where the row repeats (see
# ``repeats.py``) after a short and after a long run of equal tokens. Measured on 800 chunks of
# SmolLM2-135M's states, five layers; what repeats is told from the ids.
FOUND = {8: (0.0, 0.0), 4: (0.06, 0.47), 3: (0.10, 0.54), 2: (0.18, 0.57)}
TRIED = 192  # rows on which a machine's encoding kernel is tried


@dataclass(frozen=True, slots=True)
class Rotated:
    """Groups of g channels are rotated (``rotation.py``), divided by one scale and put into 16 or
    256 cells per value.

    ``bits`` is roughly what a value takes on disk: nibbles are stored, and zstd's Huffman stage
    removes the redundancy of unequally likely cells. So a coarser ``step`` makes a smaller store
    with the same arrays and the same decoder, at 1.5 dB from the Gaussian bound, where packing a
    fixed 3 or 2 bits is 2.5 dB from it.

    ``centre``: channel means and deviations removed before and restored after; see ``centre.py``.
    ``step``: cell width in sigma (encoder only). ``levels``: integers in 1/64 sigma, positive half
    (decoder only). Stored: ``code`` uint8 (two values per byte, the even channel low; or one),
    ``scale`` uint8 per group, 2^((k - 128) / 4).
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
        """Return this codec with the channel means and deviations of ``states[T, L, H]`` or ``[M,
        H]``, a sample of what it will code.
        """
        return replace(self, centre=Centre.of(states))

    @property
    def per_byte(self) -> int:
        return 2 if len(self.levels) == 8 else 1

    def group(self, hidden: int) -> int:
        g = group_size(hidden, self.group_limit)
        if g < GROUP_LEAST:
            raise UsageError(
                f"hidden size {hidden} is not a multiple of {GROUP_LEAST}, which {self.bits} "
                "bits need; choose 16 bits"
            )
        return g

    def arrays(self, hidden: int) -> dict[str, ArraySpec]:
        return {
            "code": ArraySpec("uint8", hidden // self.per_byte, self.pack),
            "scale": ArraySpec("uint8", hidden // self.group(hidden), self.pack),
        }

    def disk_bytes(self, hidden: int, short: float = 0.0, long: float = 0.0) -> float:
        if self.pack == "none":
            return sum(s.row_bytes for s in self.arrays(hidden).values())
        per_short, per_long = FOUND[self.bits]
        bits = hidden * (entropy(self.step, 2 * len(self.levels)) + HUFFMAN_EXCESS)
        bits *= 1 - per_short * short - per_long * long
        return (bits + hidden / self.group(hidden) * SCALE_BITS) / 8

    def encode(self, x: torch.Tensor) -> Tensors:
        """Encode with Triton kernels on CUDA (``rotated_encode_kernel.py``), to the same bytes as
        ``encode_plain``.
        """
        if x.is_cuda and _has_triton():
            from dspark.cache.codec import rotated_encode_kernel as fused_encode

            hidden = x.shape[-1]
            if self.group(hidden) >= fused_encode.LEAST_GROUP and trusted(
                self, hidden, x.device, x.dtype
            ):
                return fused_encode.encode(self, x)
        return self.encode_plain(x)

    def encode_plain(self, x: torch.Tensor) -> Tensors:
        """Encode in plain torch, on any device. The reference."""
        import torch

        hidden = x.shape[-1]
        g = self.group(hidden)
        z = x.detach()
        if self.centre:
            mean, _, inverse = self.centre.tensors(hidden, x.device)
            z = (z.float() - mean) * inverse
        groups = z.reshape(-1, g)
        # A block of groups goes through all passes while it is in the CPU cache; on a GPU blocks
        # only bound the memory.
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

    def _encode_block(
        self, groups: torch.Tensor, whole: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return code uint8[N, bytes per group] and scale uint8[N] of centred float32 ``groups[N,
        g]``; ``whole``: the states they come from, for messages.
        """
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
        """Raise an error that says what in ``x`` cannot be coded."""
        check_finite(x)
        _refuse_huge(x)

    def _quantise(
        self, y: torch.Tensor, squares: torch.Tensor, g: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cells (float32[g, N], counted from 0) and scale codes (int32[N]) of rotated groups
        ``y[g, N]``.

        The scale is the group's RMS. A group that is far from Gaussian (one massive channel rotates
        into coefficients that are all plus or minus sigma, in the middle of a wide cell; a row of
        the transform itself into one spike) is tried at other scales.
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
        """Return cells of ``y[g, N]`` at scale codes ``k[N]``, and the mean squared error of a
        group over g^2, float32[N].
        """
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
        """Decode to ``dtype`` (default float32). On CUDA with one kernel
        (``rotated_decode_kernel.py``), to the same bits as ``decode_plain``.
        """
        import torch

        dtype = dtype or torch.float32
        if coded["code"].is_cuda and _has_triton():
            from dspark.cache.codec import rotated_decode_kernel as fused

            if self.group(hidden) >= fused.LEAST_GROUP:
                return fused.decode(self, coded, hidden, dtype)
        return self.decode_plain(coded, hidden).to(dtype)

    def decode_plain(self, coded: Mapping[str, torch.Tensor], hidden: int) -> torch.Tensor:
        """Decode in plain torch, on any device: float32 [..., H]. The reference."""
        import torch

        g = self.group(hidden)
        code, scale = coded["code"], coded["scale"]
        device = code.device
        pairs = _constant(device, byte_levels, self.levels)
        scales = _constant(device, scale_over_unit)
        back = _constant(device, unrotation, g)
        out = torch.empty(scale.numel(), g, dtype=torch.float32, device=device)
        flat, k = code.reshape(-1, g // self.per_byte), scale.reshape(-1).to(torch.int32)
        size = (1 << 18 if device.type == "cpu" else 1 << 26) // g
        # Autocast would round the product to 16 bits. Its terms are small integers: exact in
        # float32 (and TF32) in any order.
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


def _refuse_huge(x: torch.Tensor) -> None:
    first = (x.abs() == x.abs().max()).nonzero()[0].tolist()
    raise StateError(
        "is too large for this codec",
        first,
        float(x[tuple(first)]),
        "below 1e9. Real states stay below 1e6: check the target, or store 16 bits.",
    )


def _scale_code(squares: torch.Tensor) -> torch.Tensor:
    """Return the scale code int32[N], 0-255, of each group from ``(rms / sqrt(g))^2``: the nearest
    quarter octave, from exponent and mantissa alone.
    """
    import torch

    m, e = torch.frexp(squares)
    quarter = (m >= 2.0**-0.75).to(torch.int32) + (m >= 2.0**-0.25).to(torch.int32)
    k = 2 * e.to(torch.int32) + (SCALE_ZERO - 2) + quarter
    return torch.where((squares > 0) & (k > 0), k, torch.zeros_like(k))


@lru_cache(maxsize=64)
def _constant(device: torch.device, make: Callable[..., Table], *args: Hashable) -> torch.Tensor:
    """Return ``make(*args)`` on ``device``, made once; usable outside inference mode regardless of
    the first caller.
    """
    import torch

    with torch.inference_mode(False):
        return torch.from_numpy(make(*args)).to(device)


@lru_cache(maxsize=16)
def trusted(codec: Rotated, hidden: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether kernel and plain torch give the same bytes here, tested on rows of all
    magnitudes with a massive channel.
    """
    import torch

    from dspark.cache.codec import rotated_encode_kernel as kernel

    with torch.inference_mode():
        made = torch.Generator().manual_seed(0)
        rows = len(codec.centre.mean) // 2 // hidden if codec.centre else 1
        x = (
            torch.randn(TRIED, rows, hidden, generator=made)
            * torch.logspace(-3, 3, TRIED)[:, None, None]
        )
        x[::7, :, 3] = 2e4
        x[0] = 0.0
        x = x.to(dtype).to(device)
        x = x[:, 0] if rows == 1 else x
        try:
            found = kernel.encode(codec, x)
        except Exception as error:  # another compiler version may raise anything
            log.warning("the encoding kernel does not run here; encoding in plain torch: %s", error)
            return False
        want = codec.encode_plain(x)
    same = all(torch.equal(found[n], want[n]) for n in want)
    if not same:
        log.warning("the encoding kernel gives different bytes here; encoding in plain torch")
    return same
