"""Pack cells of transform coefficients into bytes, several small cells per byte, and decode them.
No I/O.

A coefficient's cell is a signed integer ``q``, 0 at the middle. Columns are sorted by variance, so
the first need a byte each and the last hardly more than a zero. ``CLASSES`` says how many cells a
column may have and how many such columns share a byte. Bytes, not bit fields, let an entropy coder
see the joint value of its columns and spend less than a bit on each.

Legend: T tokens, K columns, n columns to a byte, W bytes of a row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# (cells of a column, columns to a byte); odd numbers of cells, from -(cells // 2) to cells // 2.
CLASSES: tuple[tuple[int, int], ...] = ((255, 1), (15, 2), (5, 3), (3, 5))
BAND = 30  # columns that share the two numbers of ``offsets``; a multiple of every n in CLASSES
# Share of a column's values that may lie outside its class: they are moved to the outermost cell.
OUTSIDE = 3e-4


@dataclass(frozen=True, slots=True)
class Packing:
    """How many columns, from the first on, each class of ``CLASSES`` holds; each a multiple of its
    n.
    """

    columns: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.columns) != len(CLASSES) or any(
            k < 0 or k % n for k, (_, n) in zip(self.columns, CLASSES, strict=True)
        ):
            raise ValueError(
                f"columns {self.columns}: expected multiples of {[n for _, n in CLASSES]}"
            )

    @property
    def total(self) -> int:
        return sum(self.columns)

    def spans(self) -> tuple[tuple[int, int, int, int], ...]:
        """Return, per class that has columns: its first column, one past its last, cells, columns
        per byte.
        """
        return _spans(self)

    @property
    def width(self) -> int:
        """Return the bytes per row."""
        return sum((b - a) // n for a, b, _, n in self.spans())

    def limits(self) -> list[int]:
        """Return the largest ``|q|`` of each column."""
        return [cells // 2 for a, b, cells, _ in self.spans() for _ in range(b - a)]

    @classmethod
    def fitting(cls, q: torch.Tensor) -> Packing:
        """Choose classes for columns in descending order of variance, from cells ``q`` [T, K] (any
        dtype) of a sample. A class begins where, in every run of ``BAND`` columns from there on, at
        most ``OUTSIDE`` of the values lie outside it. Up to 4 of the last columns are left out so
        that bytes are filled; if no column would be left, each has a byte of its own.
        """
        size = q.shape[1]
        begins = [0]
        for cells, _ in CLASSES[1:]:
            outside = (q.abs() > cells // 2).float().mean(0).cpu().numpy().astype(np.float64)
            ends = np.minimum(np.arange(size) + BAND, size)
            total = np.concatenate([[0.0], np.cumsum(outside)])
            bad = np.flatnonzero((total[ends] - total[:-1]) / (ends - np.arange(size)) > OUTSIDE)
            first = int(bad[-1]) + 1 if bad.size else 0
            begins.append(max(begins[-1], min(first, size)))
        columns = []
        at = 0
        for end, (_, n) in zip([*begins[1:], size], CLASSES, strict=True):
            last = end == size
            count = max(end - at, 0)
            count = count // n * n if last else -(-count // n) * n
            count = min(count, (size - at) // n * n)
            columns.append(count)
            at += count
        return cls(tuple(columns) if at else (size, 0, 0, 0))


@lru_cache(maxsize=64)
def _spans(packing: Packing) -> tuple[tuple[int, int, int, int], ...]:
    ends = itertools.accumulate(packing.columns, initial=0)
    found = zip(itertools.pairwise(ends), CLASSES, strict=True)
    return tuple((a, b, cells, n) for (a, b), (cells, n) in found if b > a)


def quantise(y: torch.Tensor, step: float) -> torch.Tensor:
    """Return the cells of ``y``: the nearest multiple of ``step``, halves away from zero, in the
    dtype of ``y``.
    """
    return (y.abs() / step + 0.5).floor() * y.sign()


def cells_of(
    y: torch.Tensor, step: float, limits: torch.Tensor, most: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cells of coefficients ``y`` [T, K], none beyond its column's of ``limits`` [K];
    and bool [T]: rows that would have to move by more than ``most`` (``Transform.limit``), or by
    something that float32 cannot hold, whose cells are zeros.
    """
    import torch

    q = quantise(y, step)
    fitting = torch.maximum(torch.minimum(q, limits), -limits)
    outside = ~(((q - fitting) * step).square().sum(1) <= most)
    fitting[outside] = 0
    return fitting, outside


def pack(q: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Pack cells ``q`` [T, K], inside their classes, to uint8 [T, W]: column j of a byte counts
    ``cells^j``.
    """
    import torch

    out = []
    for a, b, cells, n in packing.spans():
        digits = (q[:, a:b] + cells // 2).to(torch.int32).view(q.shape[0], (b - a) // n, n)
        weights = torch.tensor([cells**j for j in range(n)], dtype=torch.int32, device=q.device)
        out.append((digits * weights).sum(2).to(torch.uint8))
    return (
        torch.cat(out, 1) if out else torch.empty(q.shape[0], 0, dtype=torch.uint8, device=q.device)
    )


@lru_cache(maxsize=8)
def digits(cells: int, n: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return the ``n`` cells that each byte stands for, int64 [256, n]; unused bytes stand for
    zeros.
    """
    codes = np.arange(256)
    out = np.stack([codes // cells**j % cells - cells // 2 for j in range(n)], axis=1)
    out[codes >= cells**n] = 0
    return out


def value_table(
    packing: Packing, step: float, offsets: torch.Tensor, coarse: float = 1.0
) -> list[torch.Tensor]:
    """Return, per class with columns, what its bytes decode to, float32 [G * bands * 256, n]: in
    fine rows, and if there are two kinds of rows (G = 2) then in coarse ones.

    ``offsets`` [2 * G, bands of all classes, in order]: of each kind, mean of ``|y| / step - |q|``
    in cells 1, and in all beyond. The step of coarse rows is ``coarse`` times ``step``.
    """
    import torch

    out, band = [], 0
    for a, b, cells, n in packing.spans():
        bands = -(-(b - a) // BAND)
        q = torch.from_numpy(digits(cells, n)).float()
        kinds = []
        for first, times in zip(range(0, len(offsets), 2), (1.0, coarse), strict=False):
            near, far = (
                offsets[first + i, band : band + bands].float().cpu().view(-1, 1, 1) for i in (0, 1)
            )
            moved = q.abs() + torch.where(q.abs() == 1, near, far)
            values = torch.where(q == 0, 0.0, q.sign() * moved) * step * times
            kinds.append(values.view(bands * 256, n))
        out.append(torch.cat(kinds))
        band += bands
    return out


def unpack(
    code: torch.Tensor,
    packing: Packing,
    tables: list[torch.Tensor],
    coarse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode ``code`` uint8 [T, W] to coefficients [T, K], in the dtype and on the device of
    ``tables``. ``coarse`` bool [T]: which rows are; None: none.
    """
    import torch
    from torch.nn.functional import embedding

    out, at = [], 0
    for (a, b, _, n), table in zip(packing.spans(), tables, strict=True):
        width = (b - a) // n
        bands = torch.arange(width, dtype=torch.int32, device=code.device) // (BAND // n) * 256
        index = code[:, at : at + width].to(torch.int32) + bands
        if coarse is not None:
            index += coarse[:, None] * (-(-(b - a) // BAND) * 256)
        out.append(embedding(index, table).view(code.shape[0], b - a))
        at += width
    if not out:
        return torch.empty(code.shape[0], 0, device=code.device)
    return torch.cat(out, 1)


def band_count(packing: Packing) -> int:
    return sum(-(-(b - a) // BAND) for a, b, _, _ in packing.spans())


def offsets_of(y: torch.Tensor, step: float, packing: Packing) -> torch.Tensor:
    """Return ``offsets`` (see ``value_table``) that make every band's cells decode to their mean;
    float32 [2, bands].
    """
    import torch

    size = y.abs() / step
    cells = (size + 0.5).floor()
    limits = torch.tensor(packing.limits(), dtype=cells.dtype, device=y.device)
    q = torch.minimum(cells, limits)
    rest = size - q
    out = []
    for chosen in ((q == 1), (q >= 2)):
        total, count = (rest * chosen).sum(0), chosen.sum(0)
        band = []
        for a, b, _, _ in packing.spans():
            for i in range(a, b, BAND):
                some = count[i : min(i + BAND, b)].sum()
                band.append(total[i : min(i + BAND, b)].sum() / some.clamp(min=1))
        out.append(torch.stack(band) if band else torch.zeros(0, device=y.device))
    return torch.stack(out).float()


def entropy_columns(q: torch.Tensor) -> torch.Tensor:
    """Return the bits of an ideal coder for each integer column of ``q`` [T, K], from the counts of
    its values; float32 [K].
    """
    import torch

    out = []
    rows = q.shape[0]
    for columns in torch.split(q, 256, 1):
        low = columns.amin()
        index = (columns - low).long().T.contiguous()
        count = torch.zeros(index.shape[0], int(index.max()) + 1, device=q.device)
        count.scatter_add_(1, index, torch.ones_like(index, dtype=count.dtype))
        share = count / rows
        out.append(-(share * torch.where(share > 0, share, 1.0).log2()).sum(1))
    return torch.cat(out)
