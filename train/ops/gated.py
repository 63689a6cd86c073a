"""``silu(gate) * up`` of one tensor ``[up | gate]``, whose gradient is one tensor too.

A compiler that differentiates it fuses joining the two halves' gradients with computing them, one
thread per value of the joint result: it reads two of its three inputs twice and computes both
halves everywhere (torch 2.11's code for an H100, 5 layers of Qwen3-4B's shapes: 0.24 ms per step
more than the gradients alone). So on CUDA one Triton kernel writes both halves
(``gated_kernel.py``). The forward pass is plain: a compiler already makes one kernel of it.

Legend: n rows, I intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(joint: Tensor) -> Tensor:
    """``silu(gate) * up`` [n, I] of ``joint`` = [up | gate] [n, 2 I]."""
    out: Tensor = _Gated.apply(joint)  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
    """Keeps only the joint tensor: silu is recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor) -> Tensor:
        ctx.save_for_backward(joint)
        up, gate = joint.chunk(2, 1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (joint,) = ctx.saved_tensors
        out: Tensor = gradient(grad, joint)
        return out


def plain_gradient(grad: Tensor, joint: Tensor) -> Tensor:
    """d joint [n, 2 I] of ``grad`` [n, I]; in float32 at least, rounded once."""
    wide = torch.promote_types(joint.dtype, torch.float32)
    d, (up, gate) = grad.to(wide), joint.to(wide).chunk(2, 1)
    s = gate.sigmoid()
    return torch.cat([d * gate * s, d * up * s * (1 + gate * (1 - s))], 1).to(joint.dtype)


# Opaque, so that a compiler uses the kernel unchanged.
@torch.library.custom_op(
    "dspark::gated_gradient", mutates_args=(), schema="(Tensor grad, Tensor joint) -> Tensor"
)
def gradient(grad: Tensor, joint: Tensor) -> Tensor:
    """As ``plain_gradient``, with the kernel if available."""
    # fp64 is only for tests, and the kernel would narrow it.
    if joint.device.type != "cuda" or joint.dtype == torch.float64:
        return plain_gradient(grad, joint)
    from dspark.train.ops import gated_kernel as fused_gated

    return fused_gated.gradient(grad, joint)


@gradient.register_fake
def _(grad: Tensor, joint: Tensor) -> Tensor:
    return joint.new_empty(joint.shape)
