"""``summed.add_to`` as one Triton kernel, with loads and stores of 16 bytes.

Import only if triton is installed; ``summed`` does so when its tensors are on CUDA.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Values per program, 16 per thread.
TILE = 4096
WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def add_flat(  # type: ignore[no-untyped-def]
    total,  # [n]
    part,  # [n]
    n,
    FIRST: tl.constexpr,
    TILE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    real = at < n
    x = tl.load(part + at, mask=real).to(total.dtype.element_ty)
    if not FIRST:
        x += tl.load(total + at, mask=real)
    tl.store(total + at, x, mask=real)


def add_to(total: Tensor, part: Tensor, *, first: bool, kernel: Any = add_flat) -> None:
    """As ``summed.add_to``; both contiguous."""
    assert total.shape == part.shape
    assert total.is_contiguous()
    assert part.is_contiguous()
    n = total.numel()
    if n:
        kernel[(triton.cdiv(n, TILE),)](total, part, n, FIRST=first, TILE=TILE, num_warps=WARPS)
