"""Run a draft on answers of its own target, every anchor at once, to see what would have been
accepted, under this config or another.

Teacher-forced along a text the target wrote itself, so it needs one target forward pass per prompt
and shows, position by position, what decoding meets there. For greedy decoding it is exact: the
walk over the anchors that decoding visits gives decoding's own accepted lengths. With the
distributions it gives the expected acceptance of sampling at temperature 1.

Legend: P prompt tokens, S tokens of prompt and answer, A anchors P..S-B-1 (all their slots inside
the answer), B slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark.tools.decode.target import DecodingTarget
from dspark.train.data.batch import Batch
from dspark.train.draft.model import DraftModel
from dspark.train.draft.types import drafter

ANCHORS_AT_ONCE = 64  # bounds the [anchors, B, V] logits


@dataclass(frozen=True, slots=True)
class Answer:
    """``ids`` int64[S] of prompt and answer, ``start`` = P, the states [S, H] of each tapped layer,
    logits fp32 [S, V] of the target.
    """

    ids: Tensor
    start: int
    states: dict[int, Tensor]
    logits: Tensor

    def aux(self, layers: Sequence[int]) -> Tensor:
        """Return the states [S, L, H] in the order of ``layers``."""
        return torch.stack([self.states[i] for i in layers], dim=1)


@dataclass(frozen=True, slots=True)
class Probed:
    """``hit`` bool[A, B]: the draft's argmax is the text's token; ``accept`` fp32[A, B]: ``1 - TV``
    of draft and target there.
    """

    hit: Tensor
    accept: Tensor

    def lengths(self) -> Tensor:
        """Return the accepted length of a greedy block at every anchor, fp32 [A], including the
        target's own token.
        """
        return 1 + self.hit.float().cumprod(1).sum(1)

    def expected_lengths(self) -> Tensor:
        """Return the expected accepted lengths at temperature 1, fp32 [A]."""
        return 1 + self.accept.cumprod(1).sum(1)

    def walk(self) -> list[int]:
        """Return the accepted lengths of the blocks that greedy decoding visits, from the first
        anchor on.
        """
        lengths, at, out = self.lengths().int().tolist(), 0, list[int]()
        while at < len(lengths):
            out.append(lengths[at])
            at += lengths[at]
        return out


def answer_of(target: DecodingTarget, prompt: Sequence[int], tokens: Sequence[int]) -> Answer:
    """Run one forward pass over ``prompt`` and the ``tokens`` the target answered; ``target`` must
    be entered and tap every requested layer.
    """
    ids = [*prompt, *tokens]
    logits, aux = target.whole(ids)
    states = dict(zip(target.layer_ids, aux.unbind(1), strict=True))
    return Answer(torch.tensor(ids), len(prompt), states, logits)


@torch.inference_mode()
def probe(draft: DraftModel, answer: Answer, *, bonus_anchor: bool = False) -> Probed | None:
    """Run the draft at every anchor of ``answer``; None if the answer is shorter than a block.

    ``bonus_anchor`` reads the slots in the other layout: slot k predicts its own position, x[a+k],
    and slot 0 nothing, so B - 1 columns.
    """
    config, ids = draft.config, answer.ids
    size, total = config.block_size, len(ids)
    device = draft.device
    every = np.arange(answer.start, total - size)
    if every.size == 0:
        return None
    aux = answer.aux(config.target_layer_ids).to(device)
    hits, accepts = [], []
    for at in range(0, every.size, ANCHORS_AT_ONCE):
        batch = Batch.build(
            input_ids=ids.numpy(),
            loss_mask=np.ones(total, np.bool_),
            doc=np.zeros(total, np.int32),
            aux=aux,
            last=torch.zeros(total - 1, config.hidden_size),
            anchors=every[at : at + ANCHORS_AT_ONCE],
            block_size=size,
        ).to(device)
        h = drafter(config.speculator_type).block_states(draft(batch, draft.plan(batch)))
        skip = 1 if bonus_anchor else 0
        # Slot k is judged at the position before the token it predicts; the Markov head sees the
        # token there.
        judged = batch.slot_index[:, : size - skip]
        hit, accept = _against(
            draft, h[:, skip:], batch.input_ids, judged, answer.logits.to(device)
        )
        hits.append(hit.cpu())
        accepts.append(accept.cpu())
    return Probed(torch.cat(hits), torch.cat(accepts))


def _against(
    draft: DraftModel, h: Tensor, ids: Tensor, judged: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """``h`` [A, K, H] predicting the token after position ``judged`` int64[A, K]: (argmax is that
    token, 1 - TV), both [A, K].
    """
    head = draft.frozen_head
    own = draft.slot_logits(h)
    if draft.markov_head is not None:
        z = draft.markov_head.latent(h, draft.markov_head.embed(ids[judged]))
        own = own + draft.markov_logits(z)
    choice = own.argmax(-1)
    theirs = logits[judged].softmax(-1)
    if head.draft_ids is not None:
        choice, theirs = head.draft_ids[choice], theirs[..., head.draft_ids]
    accept = torch.minimum(own.softmax(-1), theirs).sum(-1)
    return choice == ids[judged + 1], accept
