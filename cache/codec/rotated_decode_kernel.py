"""Decode ``rotated`` codes in one Triton kernel: bytes in, states out, no intermediate results in
memory.

Legend: T rows (tokens), C groups of a row (L * H / g), g channels of a group.

A program takes one group of channels and runs down the tokens, so the rotation stays in shared
memory and the group's means and deviations in the nearest cache (in registers they would cost a
third of the occupancy). Cells become levels through a table of 16 (or 256) entries, and the
rotation is a matrix product on the tensor cores: levels and signs are integers that float16 holds,
their sums are below 2^17, so the product is exact, and every later step rounds once, as in
``Rotated.decode_plain`` (``enable_fp_fusion`` is off: a fused multiply-add would round once where
plain torch rounds twice). The two agree to the last bit; tests and ``bench/codec_speed.py`` check
that. The low nibbles of a byte are its even channels, so no lanes have to be interleaved: even and
odd rows of the rotation are multiplied separately. Import only if triton is installed;
``rotated.py`` does so for tensors on CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from dspark.cache.codec.quant import UNIT, level_table, scale_table
from dspark.cache.codec.rotated_tables import Cells
from dspark.cache.codec.rotation import unrotation

LEAST_GROUP = 32  # half of it is the shortest inner axis that a matrix product takes


class Launch(NamedTuple):
    """Tokens per tile, tiles per program, warps per program."""

    tile: int = 64
    loop: int = 4
    warps: int = 8


LAUNCH = Launch()


@triton.jit(do_not_specialize=["rows", "columns"])  # type: ignore[untyped-decorator]  # or each row length is compiled
def decode_groups(  # type: ignore[no-untyped-def]
    code,  # uint8[T, C, G / 2 or G]
    scale,  # uint8[T, C]
    levels,  # fp16[16 or 256]
    scales,  # fp32[256]
    back,  # fp16[G, G]
    mean,
    deviation,  # fp32[C, G], or anything if not CENTRED
    out,  # [T, C, G]
    rows,
    columns,
    G: tl.constexpr,
    PACKED: tl.constexpr,
    CENTRED: tl.constexpr,
    TILE: tl.constexpr,
    LOOP: tl.constexpr,
):
    column = tl.program_id(0)
    i = tl.arange(0, G)
    if PACKED:
        j = tl.arange(0, G // 2)
        even = tl.load(back + 2 * j[:, None] * G + i[None, :])
        odd = tl.load(back + (2 * j[:, None] + 1) * G + i[None, :])
    else:
        j = tl.arange(0, G)
        whole = tl.load(back + j[:, None] * G + i[None, :])
    for step in range(LOOP):
        row = (tl.program_id(1) * LOOP + step) * TILE + tl.arange(0, TILE)
        real = row < rows
        group = row.to(tl.int64) * columns + column
        if PACKED:
            at = group[:, None] * (G // 2) + j[None, :]
            cells = tl.load(code + at, mask=real[:, None], other=0).to(tl.int32)
            y = tl.dot(tl.load(levels + (cells & 15)), even)
            y = tl.dot(tl.load(levels + (cells >> 4)), odd, y)
        else:
            at = group[:, None] * G + j[None, :]
            cells = tl.load(code + at, mask=real[:, None], other=0).to(tl.int32)
            y = tl.dot(tl.load(levels + cells), whole)
        k = tl.load(scale + group, mask=real, other=0).to(tl.int32)
        y = y * tl.load(scales + k)[:, None]
        if CENTRED:
            d = tl.load(deviation + column * G + i)[None, :]
            y = y * d + tl.load(mean + column * G + i)[None, :]
        tl.store(
            out + group[:, None] * G + i[None, :], y.to(out.dtype.element_ty), mask=real[:, None]
        )


def decode(
    codec: Cells,
    coded: Mapping[str, torch.Tensor],
    hidden: int,
    dtype: torch.dtype,
    launch: Launch = LAUNCH,
    kernel: Any = decode_groups,
) -> torch.Tensor:
    """As ``Rotated.decode_plain`` and then ``.to(dtype)``, bit for bit; for groups of at least
    ``LEAST_GROUP``.
    """
    code, scale = coded["code"].contiguous(), coded["scale"].contiguous()
    g = codec.group(hidden)
    assert g >= LEAST_GROUP
    out = torch.empty(*code.shape[:-1], hidden, dtype=dtype, device=code.device)
    tables = _tables(codec, hidden, code.device)
    # Without a centre all groups are treated alike, and a program may take neighbours.
    columns = tables.mean.numel() // g if codec.centre else 1
    rows = scale.numel() // columns
    if rows:
        kernel[(columns, triton.cdiv(rows, launch.tile * launch.loop))](
            code,
            scale,
            tables.levels,
            tables.scales,
            tables.back,
            tables.mean,
            tables.deviation,
            out,
            rows,
            columns,
            G=g,
            PACKED=codec.per_byte == 2,
            CENTRED=codec.centre is not None,
            TILE=launch.tile,
            LOOP=launch.loop,
            num_warps=launch.warps,
            enable_fp_fusion=False,
        )
    return out


class _Tables(NamedTuple):
    levels: torch.Tensor
    scales: torch.Tensor
    back: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor


@lru_cache(maxsize=16)
def _tables(codec: Cells, hidden: int, device: torch.device) -> _Tables:
    """Return the kernel's tables on ``device``; made once per codec."""
    with torch.inference_mode(False):
        levels, scales, back = (
            torch.from_numpy(np.ascontiguousarray(x)).to(device)
            for x in (
                level_table(codec.levels),
                scale_table() / np.float32(UNIT),
                unrotation(codec.group(hidden)),
            )
        )
        if codec.centre:
            mean, deviation, _ = codec.centre.tensors(hidden, device)
        else:
            mean = deviation = scales
        return _Tables(levels.half(), scales, back.half(), mean, deviation)
