"""Several linear maps of one input as one product: ``joined_product(x, (W1, W2, ...)) = [x W1^T | x
W2^T | ...]``.

A few large products keep a GPU busier than many small ones: at Qwen3-4B's shapes on an H100 gate
and up together take 0.06 ms less forward and 0.1 ms less backward, a layer. Copying the weights
together in every forward pass (100 MB per layer) would cancel that gain, so the joint matrix is a
*view*: it needs weights that are adjacent in memory, each beginning where the previous one ends.
``lay_side_by_side`` moves them so; they stay separate parameters. A compiler cannot see where a
tensor will be, so the product is an opaque operation that checks at run time. If weights cannot be
adjacent (FSDP2 gathers each into its own memory), the caller gives an adjacent copy, made once
while they do not change; without it, separate weights are copied for each product.

The gradient of all weights is one product too, and each weight's is a view of its rows.

A compiled backward pass hands on those views without a copy. Splitting the result by its columns
would make autograd join their gradients again, so the next step is an operation on the joint result
whose gradient is one tensor (``gated.py``, ``qk_norm_rope.py``).

Legend: n rows of input, K its size, m_i rows of weight i, M their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def side_by_side(weights: Sequence[Tensor]) -> Tensor | None:
    """Return ``weights`` [m_i, K] as one view [M, K] of their memory, in order; None if they are
    not adjacent.
    """
    first = weights[0]
    storage, end, rows = first.untyped_storage().data_ptr(), first.storage_offset(), 0
    for w in weights:
        if (
            w.dtype != first.dtype
            or w.untyped_storage().data_ptr() != storage
            or w.storage_offset() != end
            or w.shape[1:] != first.shape[1:]
            or not w.is_contiguous()
        ):
            return None
        end, rows = end + w.numel(), rows + w.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


@torch.no_grad()
def lay_side_by_side(weights: Sequence[Tensor]) -> None:
    """Move ``weights`` [m_i, K] into one piece of memory, in order, unless they are adjacent
    already.
    """
    if side_by_side(weights) is None:
        joint = torch.cat([w.detach() for w in weights])
        for w, rows in zip(weights, joint.split_with_sizes(_sizes(weights)), strict=True):
            w.data = rows


def joined_product(x: Tensor, weights: Sequence[Tensor], joint: Tensor | None = None) -> Tensor:
    """Return ``x`` [n, K] times the transpose of each of ``weights`` [m_i, K], side by side: [n,
    M]. ``joint`` [M or more, K]: a copy of their values from its first row on; gradients still go
    to the weights.
    """
    out: Tensor = _product(x, list(weights), joint)
    return out


def _joint(weights: list[Tensor], joint: Tensor | None) -> Tensor:
    if joint is not None:
        return joint[: sum(_sizes(weights))]
    view = side_by_side(weights)
    return torch.cat(weights) if view is None else view


@torch.library.custom_op(
    "dspark::joined_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor? joint) -> Tensor",
)
def _product(x: Tensor, weights: list[Tensor], joint: Tensor | None) -> Tensor:
    return x @ _joint(weights, joint).T


@_product.register_fake
def _(x: Tensor, weights: list[Tensor], joint: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], sum(_sizes(weights)))


@torch.library.custom_op(
    "dspark::joined_linear_input",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] weights, Tensor? joint) -> Tensor",
)
def _input_gradient(grad: Tensor, weights: list[Tensor], joint: Tensor | None) -> Tensor:
    """d x [n, K] of ``grad`` [n, M]."""
    return grad @ _joint(weights, joint)


@_input_gradient.register_fake
def _(grad: Tensor, weights: list[Tensor], joint: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape[0], weights[0].shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, list[Tensor], Tensor | None], output: Tensor) -> None:
    x, weights, joint = inputs
    ctx.save_for_backward(x, joint, *weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None], None]:
    x, joint, *weights = ctx.saved_tensors
    needs_x, needs_weights, _ = ctx.needs_input_grad
    d_x = _input_gradient(grad, weights, joint) if needs_x else None
    if not any(needs_weights):
        return d_x, [None] * len(weights), None
    # No weight is read, so this one is plain: the compiler may see it. Rows of it need no copy to
    # become gradients.
    d_weights = (grad.T @ x).split_with_sizes(_sizes(weights))
    return (
        d_x,
        [d if needed else None for d, needed in zip(d_weights, needs_weights, strict=True)],
        None,
    )


_product.register_autograd(_backward, setup_context=_keep)


def _sizes(weights: Sequence[Tensor]) -> list[int]:
    return [w.shape[0] for w in weights]
