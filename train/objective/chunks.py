"""A chunk of the objective: how many slots it has, and its terms and gradients in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dspark.train.objective.kl import add_gradient, divergence

# Logits of a chunk. On CUDA two [chunk, V] tensors live at a time, 1.1 GB in bfloat16 (up to a tile
# of rows more): 1,792 slots of Qwen3's 151,936 tokens, half of 512 blocks of 7. On a CPU a few in
# fp32, and its caches like small ones.
CHUNK_LOGITS = {"cuda": 274_000_000, "cpu": 1 << 23}
# Rows per tile of the GPU's matrix products: a chunk of whole tiles leaves none partly idle, and
# rows with a few slots more or less need buffers of the same size, which the allocator reuses.
TILE_ROWS = {"cuda": 128}

# Whether torch adds a product of bfloat16 matrices to a float32 one on CUDA: seen in 2.11; 2.9
# wants a sum of the matrices' dtype.
ADDS_WIDE = torch.__version__ >= "2.11"

# Logits of draft and target, the target's row of each slot, draft ids, labels, the scales of CE, L1
# and KL (None: no KL), whether gradients are wanted -> CE, L1, hit, gradient, KL.
ChunkTerms = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, bool],
    tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
]


def chunk_rows_for(count: int, vocab_size: int, device: str) -> int:
    """Return the slots per chunk: ``count`` slots in the fewest equal chunks that ``CHUNK_LOGITS``
    allows, in whole tiles of the device.
    """
    rows = even_rows(count, max(1, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"]) // vocab_size))
    tile = TILE_ROWS.get(device, 1)
    return -(-rows // tile) * tile


def even_rows(count: int, most: int) -> int:
    """Return the size of all chunks but the last when ``count`` is cut into as few as ``most``
    allows.
    """
    return max(1, -(-count // max(1, -(-count // most))))


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over values of ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def terms_for(device: str, wide: torch.dtype) -> ChunkTerms:
    """Choose Triton on CUDA, except for float64, which the kernel would narrow."""
    if device != "cuda" or wide == torch.float64:
        return chunk_terms
    from dspark.train.objective import chunk_kernel as fused

    return fused.chunk_terms


def plus_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """``total`` [m, n] in ``wide``, changed in place, plus ``a @ b`` of [m, k] and [k, n]; without
    it the product alone.

    On CUDA the product accumulates in ``wide`` without rounding first: a separate, vocabulary-sized
    product would be written in ``a``'s dtype, read again and added in another pass.
    """
    if a.is_cuda and a.dtype != wide and ADDS_WIDE:
        if total is None:
            return torch.mm(a, b, out_dtype=wide)
        return torch.addmm(total, a, b, out_dtype=wide, out=total)
    product = a @ b
    return product.to(wide) if total is None else total.add_(product)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute, from logits ``draft`` [n, Vd] and ``target`` [d, V] of a chunk, with slot i compared
    with row ``target_at[i]`` int64[n]: CE [n], L1 [n], hit [n], d(loss)/d(draft logits) [n, Vd]
    unless only values are wanted, KL [n] if it has a scale. ``labels`` int64[n] are rows of the
    draft's vocabulary, -1 outside it.
    """
    target = target[target_at]
    wide = widened(draft.dtype)
    logits = draft.to(wide)
    log_z = logits.logsumexp(-1, keepdim=True)
    log_p = logits - log_z
    p = log_p.exp()
    q = target.to(wide).softmax(-1)
    best_draft, best_target = logits.argmax(-1), target.argmax(-1)
    inside = q if draft_ids is None else q[:, draft_ids]
    kl = None if scale_kl is None else divergence(inside, log_p)
    difference = p - inside
    l1 = difference.abs().sum(-1)
    if draft_ids is not None:
        # Probability that the target gives to tokens the draft cannot produce is lost whatever the
        # draft does.
        l1 = l1 + (1 - inside.sum(-1)).clamp(min=0)
        best_draft = draft_ids[best_draft]
    ce = log_z[:, 0] - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    ce = torch.where(labels >= 0, ce, 0)
    if not with_gradient:
        return ce, l1, best_draft == best_target, None, kl
    sign = difference.sign()
    mean_sign = (p * sign).sum(-1, keepdim=True)
    gradient = p * (scale_l1[:, None] * (sign - mean_sign) + scale_ce[:, None])
    # scale_ce is 0 where the label is unknown, so column 0 stays unchanged there.
    gradient.scatter_add_(1, labels.clamp(min=0)[:, None], -scale_ce[:, None])
    if scale_kl is not None:
        add_gradient(gradient, p, inside, scale_kl)
    return ce, l1, best_draft == best_target, gradient.to(draft.dtype), kl
