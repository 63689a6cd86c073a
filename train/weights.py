"""Weights of slots that follow the draft: D-PACE (arXiv 2605.18810), in place of the fixed ``exp(-k / decay)``.

A slot matters as far as drafts get to it and beyond it. With ``q_i`` how likely slot i is accepted, smoothed to ``s_i = (1 - a) q_i + a``,
slot k weighs ``sum over m >= k of s_0 s_1 ... s_m``: the rate at which the expected accepted length grows with ``log s_k``. So weight moves
to later slots as the earlier ones are learnt, block by block.

The paper trains on cross entropy and takes the draft's probability of the data's token for q. Here q is the acceptance ``1 - L1/2`` that
the objective is about (as SpecForge's D-PARD has it). Weights carry no gradient, and a row's keep the sum that the fixed ones have, so that
the denominators of a step are known before anything is computed (with a reduced vocabulary CE's counts known labels under the fixed
weights, so there its share of the loss drifts a little with where the others lie). Costs the objective's forward once more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dspark.train.batch import Batch
from dspark.train.draft import FrozenHead
from dspark.train.objective import Denominators, ObjectiveConfig, SlotInputs, objective

SMOOTHING = 0.5  # the paper's; it calls 0.3 to 0.7 alike


def dpace(accept: Tensor, counted: Tensor, smoothing: float = SMOOTHING) -> Tensor:
    """Weights [A, B] from ``accept`` [A, B] and the slots that count, bool[A, B], which are the first of each block; 0 elsewhere."""
    reach = torch.where(counted, (1 - smoothing) * accept + smoothing, 0).cumprod(1)
    return reach.flip(1).cumsum(1).flip(1)


@torch.no_grad()
def reweighted(batch: Batch, slots: SlotInputs, head: FrozenHead, config: ObjectiveConfig) -> SlotInputs:
    """``slots`` of ``batch`` with the weights that their acceptance gives them."""
    accept = objective(slots, head, config, Denominators(1.0, 1.0, 1.0)).accept
    weight = dpace(batch.in_blocks(accept), batch.counted).flatten()[batch.slots]
    return replace(slots, weight=weight * (slots.weight.sum() / weight.sum()))
