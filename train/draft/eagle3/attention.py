"""Attention of unrolled steps: step k of an anchor sees the rows of its context and the anchor's
own steps up to k, one query per anchor.

Legend: S tokens of the row, A anchors, Hq/Hkv heads, D head size.

A document's tokens before an anchor are an interval, as for blocks (``draft/attention.py``), and
the same for every step: the plan is that of blocks of one token, whose own key is the newest
step's. The keys of earlier steps, a few per anchor, come on top. On CUDA flex attention reads only
the tiles of the row that anchors see, and gives the logarithm of its softmax's denominator, by
which the earlier steps are weighed in. ``sdpa`` is the reference and the CPU's: a group of anchors
at a time, which cuts the row to what that group can see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.train.draft.attention import AttentionPlan, flex_and_sums, heads_first

# Anchors of an SDPA call. Each brings a key per step, of which only its own are used, and widens
# the stretch of context: few waste little, and many need few calls.
ANCHORS_AT_ONCE = 64

Pair = tuple[Tensor, Tensor]  # keys and values


class StepAttention:
    """Attention of one row's steps over ``context``: keys and values [S, Hkv, D] of the row."""

    def __init__(self, context: Pair, plan: AttentionPlan) -> None:
        self.context, self.plan = context, plan
        # Cut once: the gradient of a slice is as large as what it was cut from.
        self._cut = [tuple(x[g.low : g.high] for x in context) for g in plan.groups]
        self._sizes = [g.end - g.first for g in plan.groups]

    def __call__(self, q: Tensor, own: Sequence[Pair]) -> Tensor:
        """[A, Hq, D] of a step's queries [A, Hq, D], with ``own`` keys and values [A, Hkv, D] of
        the steps up to it.
        """
        if q.shape[0] == 0:
            return torch.zeros_like(q)
        if self.plan.backend == "flex":
            k, v = (torch.cat(pair) for pair in zip(self.context, own[-1], strict=True))
            seen, sums = flex_and_sums(q, k, v, self.plan)
            return weighed_in(q, seen, sums, own[:-1]) if len(own) > 1 else seen
        sizes = self._sizes
        steps = [(k.split_with_sizes(sizes), v.split_with_sizes(sizes)) for k, v in reversed(own)]
        return torch.cat(
            [
                self._of_group(i, x, [(k[i], v[i]) for k, v in steps])
                for i, x in enumerate(q.split_with_sizes(sizes))
            ]
        )

    def _of_group(self, i: int, q: Tensor, steps: Sequence[Pair]) -> Tensor:
        group, context = self.plan.groups[i], self._cut[i]
        own = group.mask[:, group.high - group.low :]
        mask = torch.cat([group.mask, *[own] * (len(steps) - 1)], 1)
        keys, values = (
            torch.cat([context[side], *(pair[side] for pair in steps)]) for side in (0, 1)
        )
        query, k, v = (heads_first(x) for x in (q, keys, values))
        gqa = query.shape[1] != k.shape[1]
        seen = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=gqa)
        return seen[0].transpose(0, 1)


def weighed_in(q: Tensor, seen: Tensor, sums: Tensor, own: Sequence[Pair]) -> Tensor:
    """Attention [A, Hq, D] of ``q`` over what gave ``seen`` [A, Hq, D] with the logarithms of
    denominators ``sums`` [A, Hq], and over each anchor's ``own`` keys and values, pairs of
    [A, Hkv, D].
    """
    keys, values = (torch.stack([pair[side] for pair in own], 2) for side in (0, 1))
    count, heads, _, size = keys.shape
    grouped = q.reshape(count, heads, -1, size)  # [A, Hkv, Hq / Hkv, D]
    scores = (grouped @ keys.transpose(-1, -2)).float() * size**-0.5
    weights = torch.cat([sums.reshape(count, heads, -1, 1).float(), scores], -1).softmax(-1)
    of_own = weights[..., 1:].to(values.dtype) @ values
    out = weights[..., :1] * seen.reshape(count, heads, -1, size).float() + of_own.float()
    return out.flatten(1, 2).to(q.dtype)
