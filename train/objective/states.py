"""What a draft's forward pass gives the objective: the states of its slots, and the frozen matrices
that turn them into logits.

Legend: H hidden size, V/Vd target and draft vocabulary, r Markov rank, A anchors, B slots of a
block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.cache.target.logits import PLAIN, Logits
from dspark.train.ops.scaled import write_scaled


@dataclass(frozen=True, slots=True)
class FrozenHead:
    """The target's output matrix and the draft's rows of it.

    ``lm_head`` [V, H], ``draft_head`` [Vd, H] (the same tensor if Vd = V), ``draft_ids`` int64[Vd]
    target id of a draft row and ``to_draft`` int64[V] its inverse with -1 outside; both None if Vd
    = V. ``logits``: factor and soft cap of the *target's* logits; the draft's are the plain output
    of the head, as vLLM serves them. ``wide`` [Vd, H + r], if given, is the memory whose first H
    columns are ``draft_head``; the objective uses the rest for W2.
    """

    lm_head: Tensor
    draft_head: Tensor
    draft_ids: Tensor | None = None
    to_draft: Tensor | None = None
    logits: Logits = PLAIN
    wide: Tensor | None = None

    def with_markov(self, w2: Tensor) -> Tensor:
        """``[draft_head | w2]`` [Vd, H + r] for ``w2`` [Vd, r], so that logits and their gradients
        are one product each. Written into ``wide``, where it stays until the next call; without it,
        a copy of the head.
        """
        if self.wide is None:
            return torch.cat([self.draft_head, w2], 1)
        write_scaled(self.wide[:, self.draft_head.shape[1] :], w2)
        return self.wide

    def target_logits(self, last: Tensor, out: Tensor | None = None) -> Tensor:
        """``last`` [n, H] after the final norm -> [n, V]; the product is made in ``out`` [n, V] if
        given.
        """
        return self.logits.of(torch.mm(last, self.lm_head.T, out=out))


@dataclass(frozen=True, slots=True)
class SlotStates:
    """The result of a forward pass: ``h`` [A, B, H] after the final norm, Markov latent ``z`` [A,
    B, r] and ``w2`` [Vd, r], confidence logits [A, B] fp32; None if the draft has no such head.
    ``w2`` comes from the forward pass, not from the module, so that sharded training sees it while
    it is gathered.
    """

    h: Tensor
    z: Tensor | None
    w2: Tensor | None
    confidence: Tensor | None

    def detached(self) -> SlotStates:
        """Return the same values without what a backward pass would need."""
        found = (self.h, self.z, self.w2, self.confidence)
        return SlotStates(*(None if x is None else x.detach() for x in found))  # type: ignore[arg-type]
