"""One chunk of the objective as one Triton kernel: what ``chunks.chunk_terms`` computes, without
intermediate tensors.

Legend: n slots of a chunk, d <= n rows of target logits that they share, V target vocabulary, Vd
draft vocabulary.

One program per slot reads the slot's two rows of logits three times: for both log-sum-exps and
argmaxes; in reverse, for L1, ``<s, p_d>`` and KL; and to overwrite the draft's logits with the
gradient. Adjacent slots share a target row, which all but the first read from the cache. So a chunk
costs 3 reads and 1 write of n rows and 3 reads of d rows of logits in their own dtype, less what
the cache keeps between two passes, and no fp32 tensor of the vocabulary's size exists. Kernels of
other projects (liger-kernel, cut-cross-entropy) fuse the head's product with a cross-entropy
against labels or one divergence between two heads' outputs; none gives CE, L1, the accept rate and
the gradient of all of them at once.

Import only if triton is installed (CUDA builds of torch include it); ``objective`` does so when its
tensors are on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program fills a multiprocessor, so that few rows are on their way at once and the cache still
# holds the end of a slot's rows when the next pass begins there (measured,
# docs/log/2026-11-22-step-44ms.md: 1.21 ms per chunk of 1,792 slots, 1.38 with 8 warps).
TILE = 4096
WARPS = 32


@triton.jit  # type: ignore[untyped-decorator]
def log_sum_exp(logits, size, lane, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the log-sum-exp of ``size`` logits, and where the largest is, in one pass. Each lane
    keeps its own maximum and sum, so lanes synchronise once, at the end, instead of at every tile.
    """
    # Finite, because lanes past the end would otherwise compute -inf - -inf, which is NaN.
    top = tl.full([TILE], -3e38, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    best = tl.zeros([TILE], tl.int32)
    for at in range(0, size, TILE):
        column = at + lane
        x = tl.load(
            logits + column, mask=column < size, other=-float("inf"), eviction_policy="evict_last"
        )
        x = x.to(tl.float32)
        higher = x > top
        # One of the two terms of the sum is always exp(0).
        less = tl.exp(-tl.abs(x - top))
        total = tl.where(higher, total * less + 1.0, total + less)
        best = tl.where(higher, column, best)
        top = tl.where(higher, x, top)
    high = tl.max(top, 0)
    first = tl.min(tl.where(top == high, best, size), 0)
    return high + tl.log(tl.sum(total * tl.exp(top - high), 0)), first


@triton.jit  # type: ignore[untyped-decorator]
def probabilities(  # type: ignore[no-untyped-def]
    draft,
    target,
    draft_ids,
    column,
    draft_size,
    log_d,
    log_t,
    REDUCED: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Return the draft's and the target's probabilities of the draft's tokens ``column``, and the
    logarithms of both; 0 past the end. ``KEEP``: cache policy.
    """
    real = column < draft_size
    x = tl.load(draft + column, mask=real, other=-float("inf"), eviction_policy=KEEP).to(tl.float32)
    if REDUCED:
        where = tl.load(draft_ids + column, mask=real, other=0)
    else:
        where = column
    y = tl.load(target + where, mask=real, other=-float("inf"), eviction_policy=KEEP).to(tl.float32)
    x -= log_d
    y -= log_t
    return tl.exp(x), tl.exp(y), x, y


@triton.jit  # type: ignore[untyped-decorator]
def slot_terms(  # type: ignore[no-untyped-def]
    draft,  # [n, Vd], becomes the gradient
    target,  # [d, V]
    target_at,  # int64[n], row of target of each slot
    draft_ids,  # int64[Vd] or anything if not REDUCED
    labels,  # int64[n], -1 outside Vd
    scale_ce,
    scale_l1,
    scale_kl,  # fp32[n]; of KL anything if not WITH_KL
    ce,
    l1,
    kl,  # out fp32[n]
    hit,  # out bool[n]
    draft_size,
    target_size,
    draft_stride,
    target_stride,
    REDUCED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    WITH_KL: tl.constexpr,
    TILE: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    draft += slot * draft_stride
    target += tl.load(target_at + slot) * target_stride
    lane = tl.arange(0, TILE)

    log_d, best_d = log_sum_exp(draft, draft_size, lane, TILE)
    log_t, best_t = log_sum_exp(target, target_size, lane, TILE)

    distance = tl.zeros([TILE], tl.float32)
    signed = tl.zeros([TILE], tl.float32)
    inside = tl.zeros([TILE], tl.float32)
    apart = tl.zeros([TILE], tl.float32)
    last = (draft_size - 1) // TILE * TILE
    for done in range(0, draft_size, TILE):
        # Backwards from the end, where the cache holds what the previous pass read last.
        column = last - done + lane
        p, q, log_p, log_q = probabilities(
            draft, target, draft_ids, column, draft_size, log_d, log_t, REDUCED, "evict_last"
        )
        difference = p - q
        distance += tl.abs(difference)
        signed += tl.where(difference > 0, p, tl.where(difference < 0, -p, 0.0))
        inside += q
        if WITH_KL:
            # Where the target gives nothing both logarithms may be infinite.
            apart += tl.where(q > 0, q * (log_q - log_p), 0.0)
    total = tl.sum(distance, 0)
    if REDUCED:
        # Probability that the target gives to tokens the draft cannot produce is lost whatever the
        # draft does.
        total += tl.maximum(1.0 - tl.sum(inside, 0), 0.0)
        best_d = tl.load(draft_ids + best_d)
    mean_sign = tl.sum(signed, 0)
    mass = tl.sum(inside, 0)  # that the draft can produce
    if WITH_KL:
        tl.store(kl + slot, tl.sum(apart, 0))

    label = tl.load(labels + slot)
    at_label = tl.load(draft + tl.maximum(label, 0)).to(tl.float32)
    tl.store(ce + slot, tl.where(label >= 0, log_d - at_label, 0.0))
    tl.store(l1 + slot, total)
    tl.store(hit + slot, best_d == best_t)
    if WITH_GRADIENT:
        weight_ce = tl.load(scale_ce + slot)
        weight_l1 = tl.load(scale_l1 + slot)
        if WITH_KL:
            weight_kl = tl.load(scale_kl + slot)
        # Some thread reads the label's logit above; no thread may overwrite it before that.
        tl.debug_barrier()
        for at in range(0, draft_size, TILE):
            column = at + lane
            p, q, log_p, log_q = probabilities(
                draft, target, draft_ids, column, draft_size, log_d, log_t, REDUCED, ""
            )
            difference = p - q
            sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
            slope = p * (weight_l1 * (sign - mean_sign) + weight_ce)
            slope -= tl.where(column == label, weight_ce, 0.0)
            if WITH_KL:
                slope += weight_kl * (p * mass - q)
            tl.store(draft + column, slope.to(draft.dtype.element_ty), mask=column < draft_size)


def chunk_terms(
    draft: Tensor,
    target: Tensor,
    target_at: Tensor,
    draft_ids: Tensor | None,
    labels: Tensor,
    scale_ce: Tensor,
    scale_l1: Tensor,
    scale_kl: Tensor | None,
    with_gradient: bool,
    kernel: Any = slot_terms,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As ``chunks.chunk_terms``; ``draft`` is overwritten with the gradient, which is returned.
    fp32 inside, no fp64.
    """
    slots, draft_size = draft.shape
    assert draft.stride(1) == target.stride(1) == 1
    ce, l1 = (torch.empty(slots, dtype=torch.float32, device=draft.device) for _ in range(2))
    kl = None if scale_kl is None else torch.empty_like(l1)
    hit = torch.empty(slots, dtype=torch.bool, device=draft.device)
    if slots:
        kernel[(slots,)](
            draft,
            target,
            target_at.contiguous(),
            labels if draft_ids is None else draft_ids,
            labels,
            scale_ce.float().contiguous(),
            scale_l1.float().contiguous(),
            scale_l1 if scale_kl is None else scale_kl.float().contiguous(),
            ce,
            l1,
            l1 if kl is None else kl,
            hit,
            draft_size,
            target.shape[1],
            draft.stride(0),
            target.stride(0),
            REDUCED=draft_ids is not None,
            WITH_GRADIENT=with_gradient,
            WITH_KL=scale_kl is not None,
            TILE=TILE,
            num_warps=WARPS,
        )
    return ce, l1, hit, draft if with_gradient else None, kl
