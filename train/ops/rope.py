"""Rotary positions, neox half-split.

Legend: T positions, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

# cos and sin of T positions, each [T, 1, D/2].
Rope = tuple[Tensor, Tensor]


def rope_tables(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """cos and sin of int64[T] positions, each [T, 1, D/2].

    Frequencies are made here in fp32 at every call: kept in a buffer, ``model.to(bfloat16)`` would round them, and far
    positions would then turn by wrong angles.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    angle = position.to(torch.float32)[:, None] * (1.0 / theta**exponent)
    return angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE, neox half-split, of ``x`` [T, heads, D]."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
