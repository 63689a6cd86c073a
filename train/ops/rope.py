"""Rotary positions, neox half-split.

Legend: T positions, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# cos and sin of T positions, each [T, 1, D/2].
Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Turning:
    """How fast the pairs of a head turn: its size, the base, and its scaling, as sorted items of
    ``rope_parameters``; () for none.
    """

    head_dim: int
    theta: float
    scaling: tuple[tuple[str, Any], ...] = ()


def rope_tables(position: Tensor, turning: Turning, dtype: torch.dtype) -> Rope:
    """Return cos and sin of int64[T] positions, each [T, 1, D/2], times the scaling's attention
    factor.

    Frequencies are computed here in fp32 at every call: in a buffer, ``model.to(bfloat16)`` would
    round them, and distant positions would get wrong angles.
    """
    if turning.scaling:
        frequencies, factor = _scaled(turning, position.device)
        angle = position.to(torch.float32)[:, None] * frequencies
        cos, sin = angle.cos() * factor, angle.sin() * factor
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    exponent = torch.arange(0, turning.head_dim, 2, dtype=torch.float32, device=position.device)
    angle = position.to(torch.float32)[:, None] * (
        1.0 / turning.theta ** (exponent / turning.head_dim)
    )
    return angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None]


@cache
def _scaled(turning: Turning, device: torch.device) -> tuple[Tensor, float]:
    """transformers' frequencies float32[D/2] and attention factor."""
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**dict(turning.scaling), "rope_theta": turning.theta}
    longest = int(parameters.get("original_max_position_embeddings", 1) * parameters["factor"])
    config = Qwen3Config(
        head_dim=turning.head_dim, max_position_embeddings=longest, rope_parameters=parameters
    )
    with torch.inference_mode(False):  # kept, so it must serve training too
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
            config, torch.device("cpu")
        )
        return frequencies.to(device, torch.float32), float(factor)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Apply RoPE, neox half-split, to ``x`` [T, heads, D]."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
