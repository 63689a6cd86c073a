"""Verify one drafted block: which draft tokens are accepted, and the token after them. Pure
functions.

Speculative sampling (Leviathan et al. 2023, Chen et al. 2023): a draft token drawn from p_d is kept
with probability min(1, p_t/p_d); the first rejected one is replaced by a draw from max(0, p_t -
p_d), normalised; if all are accepted, one more is drawn from p_t. The tokens are then distributed
like the target's own. With temperature 0 this is "keep while it is the target's argmax".

Legend: B draft tokens of a block, V target vocabulary. Row k of the target's logits judges draft
token k; row B gives the bonus token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def verify_greedy(drafted: Tensor, logits: Tensor) -> tuple[int, int]:
    """Compare ``drafted[B]`` with the argmax of ``logits[B+1, V]``; returns (number accepted, next
    token).
    """
    best = logits.argmax(dim=-1)
    accepted = _leading(drafted == best[:-1])
    return accepted, int(best[accepted])


def verify_sampled(
    drafted: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[int, int]:
    """Judge ``drafted[B]``, drawn from ``draft_probs[B, V]``, by ``target_probs[B+1, V]``; returns
    (number accepted, next token).
    """
    slots = torch.arange(drafted.numel(), device=drafted.device)
    p_draft, p_target = draft_probs[slots, drafted], target_probs[slots, drafted]
    # u < p_t/p_d, without the division: p_d > 0 because the token was drawn from it, but it may be
    # tiny.
    uniform = torch.rand(drafted.shape, generator=generator, device=drafted.device)
    accepted = _leading(uniform * p_draft < p_target)
    left = target_probs[accepted]
    if accepted < drafted.numel():
        left = (left - draft_probs[accepted]).clamp(min=0)
    return accepted, sample(left, generator)


def sample(weights: Tensor, generator: torch.Generator | None = None) -> int:
    """Draw one index in proportion to ``weights[V]`` (not negative, not all zero)."""
    return int(torch.multinomial(weights, 1, generator=generator))


def _leading(kept: Tensor) -> int:
    """Count how many of ``kept[B]`` are true before the first that is not."""
    return int(kept.long().cumprod(dim=0).sum())
