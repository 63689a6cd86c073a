"""The tables of ``rotated`` codes: cell widths, levels, scales. Shared by the codec and its
kernels; no torch.

Legend: g channels of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from dspark.cache.codec.quant import UNIT, level_table, scale_table

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.centre import Centre

Table = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
GROUP_LIMIT = 128
SQUARE_LIMIT = 2.0**63  # (rms / sqrt(g))^2 of a group at the largest scale code

# By bits: cell width in sigma and levels in 1/64 sigma (``gaussian_levels(step, 16)``, written out
# because they are the format).
SETTINGS: dict[int, tuple[float, tuple[int, ...]]] = {
    8: (0.03125, tuple(range(1, 256, 2))),
    4: (0.4, (13, 38, 63, 88, 114, 139, 164, 198)),
    3: (0.6, (19, 56, 93, 131, 168, 205, 243, 282)),
    2: (1.1, (32, 96, 161, 227, 294, 362, 432, 528)),
}
NEED_ZSTD = (3, 2)  # bits whose cells are stored in more than they hold


class Cells(Protocol):
    """What the kernels need from the codec (``rotated.Rotated``)."""

    @property
    def step(self) -> float: ...
    @property
    def levels(self) -> tuple[int, ...]: ...
    @property
    def centre(self) -> Centre | None: ...
    @property
    def per_byte(self) -> int: ...
    def group(self, hidden: int) -> int: ...
    def refuse(self, x: torch.Tensor) -> None: ...
    def __hash__(self) -> int: ...


def cells_per_unit(step: float, g: int) -> Table:
    """Return 1 / (g scale step) of each scale code, float32[256]: turns an unnormalised rotation
    into cells; 0 for code 0.
    """
    scale = scale_table().astype(np.float64)
    return np.divide(1.0, scale * (g * step), out=np.zeros(256), where=scale > 0).astype(np.float32)


def levels_in_cells(step: float, levels: tuple[int, ...]) -> Table:
    return (level_table(levels) / (UNIT * step)).astype(np.float32)


def byte_levels(levels: tuple[int, ...]) -> Table:
    """Return the levels of the values in each byte, float32[256, values per byte]."""
    table = level_table(levels)
    if table.shape[0] == 256:
        return table[:, None]
    return np.stack([np.tile(table, 16), np.repeat(table, 16)], axis=1)


def scale_over_unit() -> Table:
    return scale_table() / np.float32(UNIT)
