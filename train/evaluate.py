"""Teacher-forced metrics of a draft over rows of a store, and its walk: validation while training,
and ``dspark-tools score``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dspark.cache.joined import Stores
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch
from dspark.train.data.row import PackedRow
from dspark.train.draft.attention import Backend
from dspark.train.draft.model import DraftModel
from dspark.train.draft.types import drafter
from dspark.train.objective.metrics import Score, SlotMetrics
from dspark.train.objective.objective import ObjectiveOutput, objective
from dspark.train.objective.slots import Denominators, SlotInputs
from dspark.train.objective.states import SlotStates
from dspark.train.objective.walk import Walk, alphas

Observe = Callable[[Batch, SlotInputs, ObjectiveOutput], None]
ANCHORS_AT_ONCE = 512  # if a run draws no fixed number of them
UNIT = Denominators(1.0, 1.0, 1.0)  # the losses come from the metrics' own weighted means


@torch.no_grad()
def evaluate(
    model: DraftModel,
    cache: Stores,
    rows: Iterable[PackedRow | Batch],
    *,
    device: torch.device,
    dtype: torch.dtype,
    decay: float = 4.0,
    backend: Backend = "sdpa",
    reduce: Callable[[Tensor], Tensor] | None = None,
    observe: Observe | None = None,
    walk: Walk | None = None,
) -> Score:
    """The keys of ``dspark-tools score`` over every counted slot of ``rows``. States are decoded to
    ``dtype`` on ``device``.

    ``rows`` that are batches already (of padding, for a sharded model) pass through the model and
    count nowhere. ``reduce`` adds up the sums of several ranks, in place. ``observe`` sees the
    slots of every row. ``walk`` is filled, from rows that have every eligible anchor.
    """
    metrics = SlotMetrics(model.config.block_size, device)
    for row in rows:
        if isinstance(row, Batch):
            model(row, model.plan(row, backend))
            continue
        if row.slots == 0:
            continue
        batch = row.place(cache, device, dtype, model.config.target_layer_ids)
        states, slots, out = judged(model, batch, decay, backend)
        metrics.add(batch, slots, out)
        if observe is not None:
            observe(batch, slots, out)
        if walk is not None:
            walk.add(batch_alphas(model, batch, states, slots, out), batch.anchors)
    if reduce is not None:
        reduce(metrics.sums)
    return metrics.result()


def judged(
    model: DraftModel, batch: Batch, decay: float, backend: Backend
) -> tuple[SlotStates, SlotInputs, ObjectiveOutput]:
    """Forward and the objective's numbers of one row.

    A draft that was compiled whole runs as in training: torch would compile it once more for a pass
    without gradients, 7 s of a first validation on an H100.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() or model.compiled_whole):
        states: SlotStates = model(batch, model.plan(batch, backend))
    if not torch.is_grad_enabled():
        states = states.detached()
    kind = drafter(model.config.speculator_type)
    slots = kind.slots(batch, states, decay)
    return states, slots, objective(slots, model.frozen_head, kind.judging(decay), UNIT)


@torch.no_grad()
def walked(
    model: DraftModel,
    cache: Stores,
    rows: Iterable[PackedRow],
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    anchors_at_once: int,
    pad: bool,
) -> Walk:
    """The walk over ``rows``, at every eligible anchor whichever were drawn: so many at a time,
    with ``pad`` always as many, so that what was compiled for training serves.
    """
    walk = Walk(device)
    for row in rows:
        if row.slots == 0:
            continue
        host = row.batch
        placed = row.place(cache, device, dtype, model.config.target_layer_ids)
        every = np.flatnonzero(rules.eligible(host.loss_mask.numpy(), host.doc.numpy()))
        found = []
        for at in range(0, every.size, anchors_at_once):
            some = every[at : at + anchors_at_once]
            batch = placed.with_anchors(host, some, anchors_at_once if pad else 0)
            found.append(batch_alphas(model, batch, *judged(model, batch, 0.0, backend)))
        walk.add(torch.cat(found, 1), torch.from_numpy(every))
    return walk


def batch_alphas(
    model: DraftModel, batch: Batch, states: SlotStates, slots: SlotInputs, out: ObjectiveOutput
) -> Tensor:
    head, dtype = model.frozen_head, model.frozen_head.lm_head.dtype
    kind = drafter(model.config.speculator_type)
    return alphas(
        batch,
        kind.block_states(states),
        slots,
        out,
        lambda last: head.target_logits(last.to(dtype)),
        partial(kind.drafted, model),
        model.config.vocab_size,
    )
