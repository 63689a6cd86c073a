"""What happens between the joint products of q, k, v and attention: q_norm, k_norm, RoPE, and
context and blocks as one tensor of keys, one of values.

Step by step these are a dozen small kernels per layer that read most values twice, and the backward
pass has to join the gradients of v, k and q for the preceding product (``joined.py``). Here a pass
is one operation: every value is read once, and the joint gradients are written in the needed
layout. On CUDA this uses Triton kernels (``qk_norm_rope_kernel.py``), elsewhere ``plain`` and
``plain_gradient``, which are also the reference. Both compute in at least float32 and round once,
whereas a bfloat16 model computed step by step rounds after the norm, its weight and each product of
RoPE.

Legend: S context tokens, Q block tokens, T either, Hq/Hkv query and key heads, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dspark.train.ops.rope import Rope, rotate


class Inputs(NamedTuple):
    """``context`` [S, 2 Hkv D] = [v | k], ``blocks`` [Q, (2 Hkv + Hq) D] = [v | k | q], rows dense;
    S or Q may be 0. ``q_weight``, ``k_weight`` [D] are the weights of the RMS norms of a head.
    """

    context: Tensor
    blocks: Tensor
    q_weight: Tensor
    k_weight: Tensor
    eps: float
    context_rope: Rope
    block_rope: Rope

    @classmethod
    def of(cls, *flat: Any) -> Self:
        """Make it from an operation's arguments, with cos and sin separate."""
        context, blocks, q_weight, k_weight, eps, *tables = flat
        context_rope, block_rope = (tables[0], tables[1]), (tables[2], tables[3])
        return cls(context, blocks, q_weight, k_weight, eps, context_rope, block_rope)

    @property
    def heads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the parts of the products as views [T, heads, D]: (v, k) of the context, (v, k, q)
        of the blocks.
        """
        context, blocks, dim = self.context, self.blocks, self.q_weight.shape[0]
        key_heads = context.shape[1] // (2 * dim)
        query_heads = blocks.shape[1] // dim - 2 * key_heads
        two = context.view(context.shape[0], 2 * key_heads, dim).split_with_sizes(
            [key_heads] * 2, 1
        )
        three = blocks.view(blocks.shape[0], 2 * key_heads + query_heads, dim)
        return two, three.split_with_sizes([key_heads, key_heads, query_heads], 1)


def qk_norm_rope(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [Q, Hq, D], keys and values [S+Q, Hkv, D], the context's first: queries and keys are
    normed and rotated, values unchanged.
    """
    context, blocks, q_weight, k_weight, eps, context_rope, block_rope = given
    q, keys, values = _forward(context, blocks, q_weight, k_weight, eps, *context_rope, *block_rope)
    return q, keys, values


def plain(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """As ``qk_norm_rope``, in torch."""
    _, _, q_weight, k_weight, eps, context_rope, block_rope = given
    (v_ctx, k_ctx), (v_blk, k_blk, q) = given.heads
    keys = [_turned(k_ctx, k_weight, eps, context_rope), _turned(k_blk, k_weight, eps, block_rope)]
    return _turned(q, q_weight, eps, block_rope), torch.cat(keys), torch.cat([v_ctx, v_blk])


def plain_gradient(
    grads: tuple[Tensor, Tensor, Tensor], given: Inputs
) -> tuple[Tensor, Tensor, Tensor]:
    """d ``context``, d ``blocks`` and, as ``[d q_weight, d k_weight]`` [2, D] in float32 at least,
    those of the weights.

    ``grads``: of queries, keys and values.
    """
    context, blocks, q_weight, k_weight, eps, context_rope, block_rope = given
    (_, k_ctx), (_, k_blk, q) = given.heads
    parts = [context.shape[0], blocks.shape[0]]
    (dk_ctx, dk_blk), (dv_ctx, dv_blk) = (g.split_with_sizes(parts) for g in grads[1:])
    dk_ctx, dw_ctx = _turned_gradient(dk_ctx, k_ctx, k_weight, eps, context_rope)
    dk_blk, dw_blk = _turned_gradient(dk_blk, k_blk, k_weight, eps, block_rope)
    dq, dw_q = _turned_gradient(grads[0], q, q_weight, eps, block_rope)
    d_context = torch.cat([dv_ctx.flatten(1), dk_ctx.flatten(1)], 1)
    d_blocks = torch.cat([dv_blk.flatten(1), dk_blk.flatten(1), dq.flatten(1)], 1)
    return d_context, d_blocks, torch.stack([dw_q, dw_ctx + dw_blk])


def _turned(x: Tensor, weight: Tensor, eps: float, rope: Rope) -> Tensor:
    """``rotate(weight * x / rms(x))`` of ``x`` [T, heads, D]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return rotate(normed * weight, rope).to(x.dtype)


def _turned_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, rope: Rope
) -> tuple[Tensor, Tensor]:
    """d ``x`` in its dtype and d ``weight`` [D] of ``grad`` [T, heads, D]; in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    cos, sin = rope
    d = rotate(grad.to(dtype), (cos, -sin))  # back by the same angle
    d_weight = (d * normed).sum((0, 1))
    d = d * weight
    return (scale * (d - normed * (d * normed).mean(-1, keepdim=True))).to(x.dtype), d_weight


def _by_kernel(x: Tensor) -> bool:
    # fp64 is only for tests, and the kernels would narrow it.
    return x.device.type == "cuda" and x.dtype != torch.float64


_GIVEN = (
    "Tensor context, Tensor blocks, Tensor q_weight, Tensor k_weight, float eps, "
    "Tensor context_cos, Tensor context_sin, Tensor block_cos, Tensor block_sin"
)


# Opaque, so that a compiler uses the kernels unchanged.
@torch.library.custom_op(
    "dspark::qk_norm_rope", mutates_args=(), schema=f"({_GIVEN}) -> (Tensor, Tensor, Tensor)"
)
def _forward(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As ``qk_norm_rope``, with the kernels if available."""
    given = Inputs.of(*flat)
    if not _by_kernel(given.blocks):
        return plain(given)
    from dspark.train.ops import qk_norm_rope_kernel as fused

    return fused.forward(given)


@_forward.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = Inputs.of(*flat)
    (_, k_ctx), (_, k_blk, q) = given.heads
    rows = k_ctx.shape[0] + k_blk.shape[0]
    keys, values = (given.blocks.new_empty(rows, *k_blk.shape[1:]) for _ in range(2))
    return given.blocks.new_empty(q.shape), keys, values


# The kernels take gradients in any layout of tokens and heads (flex attention gives [heads, T, D]),
# so no copy restores the traced layout.
@torch.library.custom_op(
    "dspark::qk_norm_rope_gradient",
    mutates_args=(),
    schema=f"(Tensor dq, Tensor dkeys, Tensor dvalues, {_GIVEN}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout,),
)
def _gradient(
    dq: Tensor, dkeys: Tensor, dvalues: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``plain_gradient``, with the kernels if available."""
    given = Inputs.of(*flat)
    if not _by_kernel(given.blocks):
        return plain_gradient((dq, dkeys, dvalues), given)
    from dspark.train.ops import qk_norm_rope_kernel as fused

    return fused.gradient((dq, dkeys, dvalues), given)


@_gradient.register_fake
def _(dq: Tensor, dkeys: Tensor, dvalues: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    context, blocks, q_weight, *_ = flat
    wide = torch.promote_types(blocks.dtype, torch.float32)
    d_weights = q_weight.new_empty(2, q_weight.shape[0], dtype=wide)
    return context.new_empty(context.shape), blocks.new_empty(blocks.shape), d_weights


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Of the row-sized tensors only the joint products are kept: the norms are recomputed in the
    # backward pass.
    context, blocks, q_weight, k_weight, ctx.eps, *tables = inputs
    ctx.save_for_backward(context, blocks, q_weight, k_weight, *tables)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    context, blocks, q_weight, k_weight, *tables = ctx.saved_tensors
    d_context, d_blocks, d_weights = _gradient(
        *grads, context, blocks, q_weight, k_weight, ctx.eps, *tables
    )
    d_q, d_k = (
        d.to(w.dtype) for d, w in zip(d_weights.unbind(), (q_weight, k_weight), strict=True)
    )
    return d_context, d_blocks, d_q, d_k, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_keep)
