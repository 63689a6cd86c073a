"""The objective in plain autograd, written from the formulas, for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.slots import Denominators, SlotInputs
from dspark.train.objective.states import FrozenHead


def reference_loss(
    slots: SlotInputs, head: FrozenHead, config: ObjectiveConfig, denominators: Denominators
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same loss in plain autograd, all slots at once, in the dtype of the inputs:
    ``(loss, CE [N], L1 [N])``.

    Written from the formulas above, with the draft's distribution spread over all V; it shares no
    code with ``objective``. For tests: it keeps several [N, V] tensors.
    """
    logits = slots.h @ head.draft_head.T
    if slots.z is not None:
        assert slots.w2 is not None
        logits = logits + slots.z @ slots.w2.T
    if head.draft_ids is not None:
        spread = logits.new_full((logits.shape[0], head.lm_head.shape[0]), -torch.inf)
        logits = spread.index_copy(1, head.draft_ids, logits)
    target = slots.target if slots.target_at is None else slots.target[slots.target_at]
    p_target = head.target_logits(target).softmax(-1)
    l1 = (logits.softmax(-1) - p_target).abs().sum(-1)
    ce = -logits.log_softmax(-1).gather(1, slots.labels[:, None])[:, 0]
    ce = torch.where(ce.isinf(), 0, ce)
    loss = config.ce * (slots.weight * ce).sum() / denominators.ce
    loss = loss + config.l1 * (slots.weight * l1).sum() / denominators.l1
    if config.kl:
        p_draft = logits.softmax(-1)
        pairs = p_target * (p_target / torch.where(p_draft > 0, p_draft, 1)).log()
        loss = (
            loss
            + config.kl
            * (slots.weight * pairs.where(p_draft > 0, 0).sum(-1)).sum()
            / denominators.l1
        )
    if slots.confidence is not None:
        goal = 1 - 0.5 * l1.detach()
        likelihood = goal * F.logsigmoid(slots.confidence) + (1 - goal) * F.logsigmoid(
            -slots.confidence
        )
        loss = (
            loss - config.confidence * (slots.weight * likelihood).sum() / denominators.confidence
        )
    return loss, ce, l1
