"""Compute what a head beside a pipeline would gain on a store's answers, without a target: decoding
is replayed over the given text.

If the store holds the target's greedy answers this *is* greedy decoding: a token's states do not
depend on the schedule, and drafts after a wrong one are discarded. On other text a draft counts as
accepted if it is the target's own best token there, and decoding continues with the text's token.

Legend: n stages, A anchors of a row, each a token whose successor is supervised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dspark.tools.decode.gain import gains, steps_of

if TYPE_CHECKING:
    import torch

    from dspark.cache.reader import Cache
    from dspark.train.data.row import PackedRow
    from dspark.train.draft.attention import Backend
    from dspark.train.draft.spd.head import SpdHead

Bools = npt.NDArray[np.bool_]


def replay(hits: Bools) -> list[bool]:
    """Tell whether each draft that an answer's decoding judged was accepted, in order, from
    ``hits`` bool[n, M]: row ``f - 1`` says at which tokens the draft made with f tokens in flight
    is correct. Token 0 is fresh; one after a rejection too.
    """
    stages, stood, fill = hits.shape[0], [], 1
    for at in range(hits.shape[1]):
        right = bool(hits[fill - 1, at])
        stood.append(right)
        fill = min(fill + 1, stages) if right else 1
    return stood


def runs(anchors: npt.NDArray[np.int64]) -> list[slice]:
    """Yield the answers among ascending ``anchors``: runs of neighbours."""
    cuts = np.flatnonzero(np.diff(anchors) != 1) + 1
    edges = [0, *cuts.tolist(), anchors.size]
    return [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]


def pipeline_score(
    model: SpdHead,
    cache: Cache,
    rows: Iterable[PackedRow],
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
) -> dict[str, Any]:
    """Return ``gains`` over every answer of ``rows``, which have every eligible anchor. Runs one
    forward pass per number of tokens in flight.
    """
    import torch

    from dspark.train.draft.types import drafter
    from dspark.train.evaluate import UNIT
    from dspark.train.objective.config import ObjectiveConfig
    from dspark.train.objective.objective import objective

    kind, answers = drafter(model.config.speculator_type), list[tuple[int, int]]()
    judged = accepted = 0
    with torch.no_grad():
        for row in rows:
            if not row.slots:
                continue
            batch = row.place(cache, device, dtype, model.config.target_layer_ids)
            found = []
            for fill in range(1, model.stages + 1):
                states = model(batch, model.plan(batch, backend, fill=fill))
                out = objective(
                    kind.slots(batch, states, 0.0),
                    model.frozen_head,
                    ObjectiveConfig(decay=0.0),
                    UNIT,
                )
                found.append(batch.in_blocks(out.hit)[:, 0])
            hits = torch.stack(found).cpu().numpy()
            for part in runs(batch.anchors.cpu().numpy()):
                stood = replay(hits[:, part])
                tokens = len(stood) + 1
                answers.append((tokens, steps_of(model.stages, tokens, sum(stood[:-1]))))
                judged, accepted = judged + len(stood), accepted + sum(stood)
    return gains(model.stages, answers, judged, accepted)
