"""Kullback-Leibler divergence of a draft from its target over the draft's vocabulary, weighted by
the probability mass that the draft can produce.

For logits of a slot, ``KL = sum over v in Vd of p_t(v) log(p_t(v) / p_d(v))`` with p_t the softmax
over *all* V and p_d that over Vd. With ``P = sum over Vd of p_t`` its gradient is ``P p_d - p_t``.
A position whose target tokens the draft cannot produce has little weight, but none is dropped. The
renormalised divergence that others train on is ``(KL - P log P) / P``: for Vd = V the same.

Legend: n slots of a chunk, Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(target: Tensor, log_draft: Tensor) -> Tensor:
    """Return KL [n] of the target's probabilities of the draft's tokens, ``target`` [n, Vd], and
    the logarithms of the draft's, ``log_draft`` [n, Vd]. A token without probability adds nothing.
    """
    entropy: Tensor = torch.special.entr(target).sum(-1)
    cross: Tensor = -torch.linalg.vecdot(target, log_draft)
    return cross - entropy


def add_gradient(gradient: Tensor, draft: Tensor, target: Tensor, scale: Tensor) -> None:
    """Add to ``gradient`` [n, Vd] that of ``scale`` [n] times the divergence of probabilities
    ``draft`` and ``target`` [n, Vd].
    """
    gradient.addcmul_(draft, (scale * target.sum(-1))[:, None])
    gradient.addcmul_(target, -scale[:, None])
