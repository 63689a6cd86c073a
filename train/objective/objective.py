"""The training objective of every draft, and its gradients, without a tensor of slots x vocabulary
outliving a chunk.

Legend: N counted slots, H hidden size, V target vocabulary, Vd draft vocabulary, r Markov rank, A
anchors, B slots of a block.

For a slot with draft distribution p_d and target distribution p_t (both softmax, fp32), data token
y and weight ``w = exp(-k / decay)``::

    CE = -log p_d(y)      L1 = sum_v |p_d(v) - p_t(v)| = 2 TV BCE = bce(confidence, 1 - L1/2
                          detached)
    loss = ce * sum(w CE)/D_ce + l1 * sum(w L1)/D_l1 + kl * sum(w KL)/D_l1
           + confidence * sum(w BCE)/D_confidence

The denominators D are passed in, so that the rows of one optimizer step (on any number of ranks)
share one mean.
With a reduced vocabulary p_t stays the softmax over all V and p_d is 0 outside Vd; CE skips labels
outside Vd.

``l1`` weighs L1, ``tv`` weighs TV = L1/2: ``{"ce": 0.1, "l1": 0.9}`` (DeepSpec's objective) equals
``{"ce": 0.1, "tv": 1.8}``, and ``{"ce": 0.1, "tv": 0.9}`` weighs the distance half as much. ``kl``
weighs the divergence of ``objective/kl.py``: L1 hardly moves a slot whose draft is far off, since
its gradient is the draft's own probability times a sign; the divergence does.

Implementation: both softmaxes of a chunk are computed once and give losses, metrics and gradient
together, and the gradient is propagated to h, z and W2 at once. d(L1)/d(logits) = p_d * (s - <s,
p_d>) with s = sign(p_d - p_t). On CUDA a chunk is one Triton kernel (``chunk_kernel.chunk_terms``),
elsewhere plain torch (``chunks.chunk_terms``). ``reference.reference_loss`` is the same in plain
autograd, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.train.objective.chunks import (
    ChunkTerms,
    chunk_rows_for,
    even_rows,
    plus_product,
    terms_for,
    widened,
)
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.slots import Chunk, Denominators, SlotInputs
from dspark.train.objective.states import FrozenHead
from dspark.train.ops.scaled import write_scaled


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """``loss`` carries gradients. The rest is detached, one value per slot [N]: ``ce`` (0 where the
    label is outside Vd), ``l1``, ``kl`` (None if its weight is 0), ``confidence`` BCE and
    ``confidence_probability`` (None without the head), ``hit`` = draft's argmax is the target's,
    and ``ce_known`` = CE counts.
    """

    loss: Tensor
    ce: Tensor
    l1: Tensor
    confidence: Tensor | None
    confidence_probability: Tensor | None
    hit: Tensor
    ce_known: Tensor
    kl: Tensor | None = None

    @property
    def accept(self) -> Tensor:
        """Return the probability that the slot's token is accepted, ``1 - L1/2`` in [0, 1], [N]."""
        return (1 - 0.5 * self.l1).clamp(0, 1)


def objective(
    slots: SlotInputs,
    head: FrozenHead,
    config: ObjectiveConfig,
    denominators: Denominators,
    *,
    chunk_rows: int | None = None,
    terms: ChunkTerms | None = None,
) -> ObjectiveOutput:
    """Return the loss of one row's share of a step. Products run in the dtype of ``head.lm_head``,
    softmax and sums in fp32.

    ``chunk_rows`` slots at a time, by default ``chunk_rows_for`` them, in chunks of nearly equal
    size. ``terms`` replaces the work on a chunk (default: Triton on CUDA, plain torch elsewhere).
    """
    dtype, wide = head.lm_head.dtype, widened(slots.h.dtype)
    device, count = slots.h.device.type, slots.h.shape[0]
    rows = (
        even_rows(count, chunk_rows)
        if chunk_rows
        else chunk_rows_for(count, head.lm_head.shape[0], device)
    )
    labels = slots.labels if head.to_draft is None else head.to_draft[slots.labels]
    weight = slots.weight.to(wide)
    known = labels >= 0
    scale_ce = weight * known * (config.ce / max(denominators.ce, 1e-12))
    scale_l1 = weight * (config.l1 / max(denominators.l1, 1e-12))
    scale_kl = weight * (config.kl / max(denominators.l1, 1e-12)) if config.kl else None
    x = slots.h.to(dtype)
    loss, ce, l1, hit, kl = _ChunkedTerms.apply(  # type: ignore[no-untyped-call]
        x if slots.z is None else torch.cat([x, slots.z.to(dtype)], 1),
        None if slots.w2 is None else slots.w2.to(dtype),
        slots.target.to(dtype),
        slots.target_at,
        slots.chunks(rows),
        rows,
        head,
        labels,
        scale_ce,
        scale_l1,
        torch.is_grad_enabled(),
        terms or terms_for(device, wide),
        scale_kl,
    )
    bce = probability = None
    if slots.confidence is not None:
        accept = (1 - 0.5 * l1).clamp(0, 1)
        term = F.binary_cross_entropy_with_logits(
            slots.confidence.to(wide), accept, reduction="none"
        )
        loss = (
            loss + (config.confidence / max(denominators.confidence, 1e-12)) * (weight * term).sum()
        )
        bce, probability = term.detach(), slots.confidence.detach().to(wide).sigmoid()
    return ObjectiveOutput(loss, ce, l1, bce, probability, hit, known, kl if config.kl else None)


class _ChunkedTerms(torch.autograd.Function):
    """``sum(scale_ce * CE + scale_l1 * L1 + scale_kl * KL)``; gradients are computed in the
    forward pass, and the backward pass only scales them.

    ``x`` [N, K] is [h | z], K = H + r, with a Markov head and h alone without (``w2`` None): the
    draft's logits are one product with [head | W2], and d_x one product with their gradient. A
    separate product would read and write (or read) all [n, Vd] once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w2: Tensor | None,
        target: Tensor,
        target_at: Tensor | None,
        chunks: list[Chunk],
        rows: int,
        head: FrozenHead,
        labels: Tensor,
        scale_ce: Tensor,
        scale_l1: Tensor,
        with_gradient: bool,
        terms: ChunkTerms,
        scale_kl: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count, wide = x.shape[0], scale_ce.dtype
        ce, l1 = x.new_empty(count, dtype=wide), x.new_empty(count, dtype=wide)
        kl = x.new_zeros(0 if scale_kl is None else count, dtype=wide)
        hit = torch.empty(count, dtype=torch.bool, device=x.device)
        matrix = head.draft_head if w2 is None else head.with_markov(w2)  # [Vd, K]
        hidden = head.draft_head.shape[1]
        d_x = torch.empty_like(x) if with_gradient else None
        # Chunks accumulate in fp32: in bf16 the sum of many small parts would stop growing.
        d_w2 = None
        if target_at is None:
            target_at = torch.arange(count, device=x.device)
        # Allocated once and used by every chunk: otherwise the last chunk's buffers would live
        # beside the next one's.
        draft_buffer = x.new_empty(rows, matrix.shape[0])
        target_buffer = x.new_empty(rows, head.lm_head.shape[0])
        for chunk in chunks:
            part = chunk.slots
            logits = torch.mm(x[part], matrix.T, out=draft_buffer[: part.stop - part.start])
            theirs = head.target_logits(
                target[chunk.rows], target_buffer[: chunk.rows.stop - chunk.rows.start]
            )
            ce[part], l1[part], hit[part], gradient, divergence = terms(
                logits,
                theirs,
                target_at[part] - chunk.rows.start,
                head.draft_ids,
                labels[part],
                scale_ce[part],
                scale_l1[part],
                None if scale_kl is None else scale_kl[part],
                with_gradient,
            )
            if divergence is not None:
                kl[part] = divergence
            if gradient is None:
                continue
            assert d_x is not None
            torch.mm(gradient, matrix, out=d_x[part])
            if w2 is not None:
                d_w2 = plus_product(d_w2, gradient.T, x[part, hidden:], wide)
        if with_gradient and w2 is not None and d_w2 is None:
            d_w2 = torch.zeros_like(w2, dtype=wide)  # no slot at all
        if with_gradient:
            ctx.save_for_backward(d_x, d_w2)
        ctx.w2_dtype = None if w2 is None else w2.dtype
        ctx.mark_non_differentiable(ce, l1, hit, kl)
        loss = (scale_ce * ce + scale_l1 * l1).sum()
        return loss if scale_kl is None else loss + (scale_kl * kl).sum(), ce, l1, hit, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_w2 = ctx.saved_tensors
        if d_w2 is not None:
            # Scaled and rounded in one pass: in fp32 this is the largest tensor here after the
            # logits.
            d_w2 = write_scaled(torch.empty_like(d_w2, dtype=ctx.w2_dtype), d_w2, grad)
        return d_x * grad.to(d_x.dtype), d_w2, *(None,) * 11
