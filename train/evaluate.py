"""Teacher-forced metrics of a draft over rows of a store: validation while training, and ``dspark-tools score``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dspark.cache.reader import Cache
from dspark.train.data.batch import Batch
from dspark.train.data.row import Row
from dspark.train.draft.attention import Backend
from dspark.train.draft.model import DraftModel
from dspark.train.draft.types import drafter
from dspark.train.objective.metrics import Score, SlotMetrics
from dspark.train.objective.objective import (
    Denominators,
    ObjectiveConfig,
    ObjectiveOutput,
    SlotInputs,
    objective,
)


@torch.no_grad()
def evaluate(
    model: DraftModel,
    cache: Cache,
    rows: Iterable[Row | Batch],
    *,
    device: torch.device,
    dtype: torch.dtype,
    decay: float = 4.0,
    backend: Backend = "sdpa",
    reduce: Callable[[Tensor], Tensor] | None = None,
    observe: Callable[[Batch, SlotInputs, ObjectiveOutput], None] | None = None,
) -> Score:
    """The keys of ``dspark-tools score`` over every counted slot of ``rows``. States are decoded to ``dtype`` on ``device``.

    ``rows`` that are batches already (of padding, for a sharded model) pass through the model and count nowhere. ``reduce`` adds up
    the sums of several ranks, in place. ``observe`` sees the slots of every row.
    """
    config = ObjectiveConfig(decay=decay)
    unit = Denominators(1.0, 1.0, 1.0)  # the losses come out of the metrics' own weighted means
    metrics = SlotMetrics(model.config.block_size, device)
    kind = drafter(model.config.speculator_type)
    for row in rows:
        if isinstance(row, Batch):
            model(row, model.plan(row, backend))
            continue
        if row.slots == 0:
            continue
        batch = row.place(cache, device, dtype, model.config.target_layer_ids)
        states = model(batch, model.plan(batch, backend))
        slots = kind.slots(batch, states, decay)
        out = objective(slots, model.frozen_head, config, unit)
        metrics.add(batch, slots, out)
        if observe is not None:
            observe(batch, slots, out)
    if reduce is not None:
        reduce(metrics.sums)
    return metrics.result()
