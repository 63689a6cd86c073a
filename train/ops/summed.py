"""Add the gradient of a row to the float32 sum of a step, or write it there as the step's first.

On CUDA torch processes one value per thread at a time if dtypes differ: 2.1 TB/s on an H100, two
thirds of what its memory gives. So there large tensors go through a Triton kernel
(``summed_kernel.py``); small ones do not repay its launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 1 << 20  # elements


def add_to(total: Tensor, part: Tensor, *, first: bool) -> None:
    """Add ``part`` to ``total`` float32, of one shape, in place; ``first``: replace ``total``."""
    if (
        total.is_cuda
        and total.numel() >= LARGE
        and (total.dtype, part.dtype) == (torch.float32, torch.bfloat16)
        and total.is_contiguous()
        and part.is_contiguous()
    ):
        from dspark.train.ops import summed_kernel

        summed_kernel.add_to(total, part, first=first)
    elif first:
        total.copy_(part)
    else:
        total.add_(part)
