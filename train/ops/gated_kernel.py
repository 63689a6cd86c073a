"""The gradient of ``gated.gated`` as one Triton kernel: each input read once, both halves written
where the next product reads them.

Legend: n rows, I intermediate size.

2 + 2 + 2 bytes read and 4 written per value of n x I in bfloat16: 0.35 GB, about 0.12 ms, at 3,584
x 9,728.

Import only if triton is installed; ``gated`` does so when its tensors are on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 values per thread: 16 bytes of bfloat16, the most that one load takes.
TILE = 1024
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def gated_gradient(  # type: ignore[no-untyped-def]
    grad,  # [n, I]
    joint,  # [n, 2 I] = [up | gate]
    out,  # [n, 2 I], dense
    size,  # I
    grad_stride,
    joint_stride,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = column < size
    grad += row * grad_stride
    joint += row * joint_stride
    out += row * (2 * size)
    d = tl.load(grad + column, mask=real).to(tl.float32)
    up = tl.load(joint + column, mask=real).to(tl.float32)
    gate = tl.load(joint + size + column, mask=real).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * s
    kind = out.dtype.element_ty
    tl.store(out + column, (d * silu).to(kind), mask=real)
    tl.store(out + size + column, (d * up * s * (1.0 + gate * (1.0 - s))).to(kind), mask=real)


def gradient(grad: Tensor, joint: Tensor, kernel: Any = gated_gradient) -> Tensor:
    """As ``gated.gradient``; fp32 inside, no fp64."""
    rows, size = grad.shape
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    assert joint.stride(1) == 1
    out = torch.empty_like(joint, memory_format=torch.contiguous_format)
    if rows:
        kernel[(rows, triton.cdiv(size, TILE))](
            grad, joint, out, size, grad.stride(0), joint.stride(0), TILE=TILE, num_warps=WARPS
        )
    return out
