"""Kullback-Leibler divergence of a draft from its target over the draft's vocabulary, weighted by
the probability mass that the draft can produce.

For logits of a slot, ``KL = sum over v in Vd of p_t(v) log(p_t(v) / p_d(v))`` with p_t the softmax
over *all* V and p_d that over Vd. With ``P = sum over Vd of p_t`` its gradient is ``P p_d - p_t``.
A position whose target tokens the draft cannot produce has little weight, but none is dropped. The
renormalised divergence that others train on is ``(KL - P log P) / P``: for Vd = V the same.

Legend: n slots of a chunk, d target rows of it, V/Vd target and draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_terms(
    draft: Tensor,
    target: Tensor,
    target_at: Tensor,
    draft_ids: Tensor | None,
    scale: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return KL [n] of logits ``draft`` [n, Vd] and ``target`` [d, V], with slot i compared with
    row ``target_at[i]``, and ``scale`` [n] times its gradient [n, Vd] in the dtype of ``draft`` if
    wanted. Neither input is changed.
    """
    wide = torch.promote_types(draft.dtype, torch.float32)
    log_q = target[target_at].to(wide).log_softmax(-1)
    log_p = draft.to(wide).log_softmax(-1)
    if draft_ids is not None:
        log_q = log_q[:, draft_ids]
    q = log_q.exp()
    kl = (q * torch.where(q > 0, log_q - log_p, 0)).sum(-1)
    if not with_gradient:
        return kl, None
    gradient = log_p.exp().mul_(q.sum(-1, keepdim=True)).sub_(q).mul_(scale[:, None])
    return kl, gradient.to(draft.dtype)
