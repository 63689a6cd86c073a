"""Encode ``rotated`` codes in two Triton kernels: states in, bytes out, with one pass over memory
instead of plain torch's thirty.

Legend: N groups of all rows, C groups of a row (L * H / g), g channels of a group.

Every step rounds exactly as ``Rotated.encode_plain`` does, in the same order (butterflies and
energies are halved in registers, ``enable_fp_fusion`` is off), so the bytes are the same. Groups
far from Gaussian are listed and tried at other scales by a second kernel: in plain torch, those few
groups took some 150 launches per call and two waits for the device, ten times the kernel's own
time; and tried in the first kernel, a single one makes its whole tile do thirteen times the work.
Whether this machine's compiler preserves all that is tested once per process on a few rows
(``rotated.trusted``); if not, plain torch codes everything. Import only if triton is installed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from dspark.cache.codec.quant import distortion, scale_table
from dspark.cache.codec.rotated_tables import SQUARE_LIMIT, Cells, cells_per_unit, levels_in_cells
from dspark.cache.codec.rotation import signs

LEAST_GROUP = 16
AGAIN_PROGRAMS = 528  # four a multiprocessor of an H100
LAUNCH = 4096, 8  # values per program, and its warps; the bytes are the same with any


@triton.jit  # type: ignore[untyped-decorator]
def energies(x, TILE: tl.constexpr, G: tl.constexpr, LOG: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sum of squares of each row of ``x[TILE, G]``: entry i plus entry i + g/2, then
    again.
    """
    e = x * x
    for s in tl.static_range(LOG):
        a, b = tl.split(tl.permute(tl.reshape(e, (TILE, 2, G >> (s + 1))), (0, 2, 1)))
        e = a + b
    return tl.reshape(e, (TILE,))


@triton.jit  # type: ignore[untyped-decorator]
def cells_at(  # type: ignore[no-untyped-def]
    y,
    k,
    per_unit,
    levels,
    scales,
    step,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    G: tl.constexpr,
    LOG: tl.constexpr,
):
    """Cells of ``y[TILE, G]`` at scale codes ``k[TILE]``, and the mean squared error of a group
    over g^2.
    """
    t = y * tl.load(per_unit + k)[:, None]
    cell = (tl.minimum(tl.maximum(tl.floor(t), -HALF), HALF - 1) + HALF).to(tl.int32)
    error = energies(t - tl.load(levels + cell), TILE, G, LOG)
    width = tl.load(scales + k) * step
    return cell, error * width * width


@triton.jit  # type: ignore[untyped-decorator]
def rotated(  # type: ignore[no-untyped-def]
    x,
    flip,
    mean,
    inverse,
    row,
    real,
    columns,
    G: tl.constexpr,
    LOG: tl.constexpr,
    CENTRED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return groups ``row[TILE]`` centred and rotated, [TILE, G], and their mean squares over g;
    zeros where not ``real``.
    """
    i = tl.arange(0, G)
    y = tl.load(x + row[:, None] * G + i[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    if CENTRED:
        at = (row % columns)[:, None] * G + i[None, :]
        y = (y - tl.load(mean + at)) * tl.load(inverse + at)
    squares = energies(y, TILE, G, LOG) * (1.0 / (G * G))
    y = y * tl.load(flip + i)[None, :]
    for s in tl.static_range(LOG):
        a, b = tl.split(tl.permute(tl.reshape(y, (TILE, G >> (s + 1), 2, 1 << s)), (0, 1, 3, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (TILE, G))
    return y, squares


@triton.jit
def scale_code(squares):  # type: ignore[no-untyped-def]
    """Return the scale code of each group: the nearest quarter octave, from exponent and mantissa
    alone.
    """
    bits = squares.to(tl.int32, bitcast=True)
    # squares = m 2^e, m from 0.5 to 1
    m = ((bits & 0x7FFFFF) | (126 << 23)).to(tl.float32, bitcast=True)
    k = 2 * ((bits >> 23) - 126) + 126
    k += (m >= 0.5946035575013605).to(tl.int32) + (m >= 0.8408964152537145).to(tl.int32)
    k = tl.where((squares > 0) & (k > 0), k, 0)
    return tl.minimum(k, 255)


@triton.jit  # type: ignore[untyped-decorator]
def store(  # type: ignore[no-untyped-def]
    code, scale, row, cell, k, real, TILE: tl.constexpr, G: tl.constexpr, PACKED: tl.constexpr
):
    if PACKED:
        low, high = tl.split(tl.reshape(cell, (TILE, G // 2, 2)))
        j = tl.arange(0, G // 2)
        tl.store(
            code + row[:, None] * (G // 2) + j[None, :],
            (low | (high << 4)).to(tl.uint8),
            mask=real[:, None],
        )
    else:
        i = tl.arange(0, G)
        tl.store(code + row[:, None] * G + i[None, :], cell.to(tl.uint8), mask=real[:, None])
    tl.store(scale + row, k.to(tl.uint8), mask=real)


@triton.jit(do_not_specialize=["groups", "columns", "step", "far", "limit"])  # type: ignore[untyped-decorator]
def encode_groups(  # type: ignore[no-untyped-def]
    x,  # [N, G], any float
    flip,  # fp32[G]
    mean,
    inverse,  # fp32[C, G], or anything if not CENTRED
    per_unit,  # fp32[256]
    levels,  # fp32[16 or 256]
    scales,  # fp32[256]
    code,  # uint8[N, G / 2 or G]
    scale,  # uint8[N]
    again,  # int32[N], the groups to try again, in any order
    told,  # int32[2]: how many of them; 1 if a group cannot be coded
    groups,
    columns,
    step,
    far,
    limit,
    HALF: tl.constexpr,
    G: tl.constexpr,
    LOG: tl.constexpr,
    PACKED: tl.constexpr,
    CENTRED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Encode every group at the scale of its mean square."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    real = row < groups
    y, squares = rotated(x, flip, mean, inverse, row, real, columns, G, LOG, CENTRED, TILE)
    k = scale_code(squares)
    cell, error = cells_at(y, k, per_unit, levels, scales, step, HALF, TILE, G, LOG)
    store(code, scale, row, cell, k, real, TILE, G, PACKED)
    bad = (real & (error > far * squares * G)).to(tl.int32)
    count = tl.sum(bad, 0)
    if count > 0:
        first = tl.atomic_add(told, count)
        tl.store(again + first + tl.cumsum(bad, 0) - 1, row.to(tl.int32), mask=bad > 0)
    # Not "greater than": NaN is not a number to compare.
    wrong = real & ~(squares <= limit)
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tl.atomic_max(told + 1, 1)


@triton.jit(do_not_specialize=["columns", "step"])  # type: ignore[untyped-decorator]
def encode_again(  # type: ignore[no-untyped-def]
    x,
    flip,
    mean,
    inverse,
    per_unit,
    levels,
    scales,
    code,
    scale,
    again,
    told,
    columns,
    step,
    HALF: tl.constexpr,
    G: tl.constexpr,
    LOG: tl.constexpr,
    PACKED: tl.constexpr,
    CENTRED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Try the groups of ``again`` at twelve other scales; each keeps the best. A fixed number of
    programs shares them, so the host need not wait for their number.
    """
    count = tl.load(told)
    for at in range(tl.program_id(0) * TILE, count, tl.num_programs(0) * TILE):
        lane = at + tl.arange(0, TILE)
        real = lane < count
        row = tl.load(again + lane, mask=real, other=0).to(tl.int64)
        y, squares = rotated(x, flip, mean, inverse, row, real, columns, G, LOG, CENTRED, TILE)
        first = scale_code(squares)
        k = first
        cell, error = cells_at(y, k, per_unit, levels, scales, step, HALF, TILE, G, LOG)
        for trial in range(12):
            offset = tl.where(trial < 4, trial - 4, trial - 3)  # -4 to 8 without 0
            other = tl.minimum(tl.maximum(first + offset, 1), 255)
            tried, e = cells_at(y, other, per_unit, levels, scales, step, HALF, TILE, G, LOG)
            better = e < error
            cell = tl.where(better[:, None], tried, cell)
            error = tl.where(better, e, error)
            k = tl.where(better, other, k)
        store(code, scale, row, cell, k, real, TILE, G, PACKED)


def encode(codec: Cells, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """As ``Rotated.encode_plain``, byte for byte."""
    hidden = x.shape[-1]
    g = codec.group(hidden)
    x = x.detach().contiguous()
    tables = _tables(codec, hidden, x.device)
    columns = tables.mean.numel() // g if codec.centre else 1
    groups = x.numel() // g
    code = torch.empty(groups, g // codec.per_byte, dtype=torch.uint8, device=x.device)
    scale = torch.empty(groups, dtype=torch.uint8, device=x.device)
    again = torch.empty(groups, dtype=torch.int32, device=x.device)
    told = torch.zeros(2, dtype=torch.int32, device=x.device)
    values, warps = LAUNCH
    tile = max(1, values // g)
    if groups:
        shape: dict[str, Any] = {
            "HALF": len(codec.levels),
            "G": g,
            "LOG": g.bit_length() - 1,
            "PACKED": codec.per_byte == 2,
            "CENTRED": codec.centre is not None,
            "TILE": tile,
            "num_warps": warps,
            "enable_fp_fusion": False,
        }
        tiles = triton.cdiv(groups, tile)
        given = (x, *tables, code, scale, again, told)
        far = 2.0 * distortion(codec.step, codec.levels)
        encode_groups[(tiles,)](*given, groups, columns, codec.step, far, SQUARE_LIMIT, **shape)
        encode_again[(min(tiles, AGAIN_PROGRAMS),)](*given, columns, codec.step, **shape)
        # Waits for the kernels, which a caller on another stream than the target's does anyway.
        if int(told[1]):
            codec.refuse(x)
    lead = x.shape[:-1]
    return {
        "code": code.view(*lead, hidden // codec.per_byte),
        "scale": scale.view(*lead, hidden // g),
    }


class _Tables(NamedTuple):
    flip: torch.Tensor
    mean: torch.Tensor
    inverse: torch.Tensor
    per_unit: torch.Tensor
    levels: torch.Tensor
    scales: torch.Tensor


@lru_cache(maxsize=16)
def _tables(codec: Cells, hidden: int, device: torch.device) -> _Tables:
    """Return the kernel's tables on ``device``; made once per codec."""
    g = codec.group(hidden)
    with torch.inference_mode(False):
        arrays = (
            signs(g),
            cells_per_unit(codec.step, g),
            levels_in_cells(codec.step, codec.levels),
            scale_table(),
        )
        flip, per_unit, levels, scales = (
            torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays
        )
        mean = inverse = torch.zeros(1, device=device)
        if codec.centre:
            mean, _, inverse = (t.contiguous() for t in codec.centre.tensors(hidden, device))
        return _Tables(flip, mean, inverse, per_unit, levels, scales)
