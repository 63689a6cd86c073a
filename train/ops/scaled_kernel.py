"""``scaled.write_scaled`` as one Triton kernel, with loads and stores of 16 bytes if the rows of
both matrices begin at a multiple of 16.

Legend: n rows, k columns.

Import only if triton is installed; ``scaled`` does so when its tensors are on CUDA.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Values per program, 16 per thread: as many whole rows, of a power of two of columns, as fit.
TILE = 2048
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def scaled_rows(  # type: ignore[no-untyped-def]
    out,  # [n, k]
    source,  # [n, k]
    scale,  # one value, or None
    rows,  # n
    columns,  # k
    out_stride,
    source_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    real = (row < rows) & (column < columns)
    x = tl.load(source + row * source_stride + column, mask=real)
    if scale is not None:
        x = x.to(tl.float32) * tl.load(scale).to(tl.float32)
    tl.store(out + row * out_stride + column, x.to(out.dtype.element_ty), mask=real)


def write_scaled(
    out: Tensor, source: Tensor, scale: Tensor | None, kernel: Any = scaled_rows
) -> Tensor:
    """As ``scaled.write_scaled``; fp32 inside, no fp64."""
    assert out.shape == source.shape
    assert out.stride(1) == source.stride(1) == 1
    assert scale is None or scale.dim() == 0
    rows, columns = source.shape
    if source.numel():
        wide = min(triton.next_power_of_2(columns), TILE)
        kernel[(triton.cdiv(rows, TILE // wide), triton.cdiv(columns, wide))](
            out,
            source,
            scale,
            rows,
            columns,
            out.stride(0),
            source.stride(0),
            ROWS=TILE // wide,
            COLUMNS=wide,
            num_warps=WARPS,
        )
    return out
