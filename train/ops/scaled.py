"""Write a matrix, optionally times one number, into another matrix of any row stride, rounding once
if the dtypes differ. On CUDA torch processes one value per thread at a time if dtypes differ or
rows are strided: about twice the time that the bytes need. So there it is one Triton kernel
(``scaled_kernel.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

# What the kernel takes. fp64 is for tests, and it would narrow it.
KINDS = (torch.float32, torch.bfloat16)


def write_scaled(out: Tensor, source: Tensor, scale: Tensor | None = None) -> Tensor:
    """``source`` [n, k] times ``scale`` (a 0-dim tensor on the device of ``source``) into ``out``
    [n, k], which is returned. No gradient flows through it.
    """
    dense = source.stride(1) == out.stride(1) == 1
    if not (
        dense and source.is_cuda and out.is_cuda and source.dtype in KINDS and out.dtype in KINDS
    ):
        return plain(out, source, scale)
    from dspark.train.ops import scaled_kernel as fused_scaled

    return fused_scaled.write_scaled(out, source, scale)


def plain(out: Tensor, source: Tensor, scale: Tensor | None) -> Tensor:
    """As ``write_scaled``, in torch; in float32 at least."""
    if scale is None:
        return out.copy_(source)
    return torch.mul(source.to(torch.promote_types(source.dtype, torch.float32)), scale, out=out)
