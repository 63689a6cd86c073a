"""One optimizer step: this rank's rows one after another, their gradients summed with the other
ranks', one update.

Nothing in it waits for the GPU. What all ranks must know to weigh a slot (the sums of weights over
every row of the step) is a few numbers from the rows' masks, exchanged on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.train.data.batch import Batch
from dspark.train.data.feed import Feed
from dspark.train.data.row import PackedRow
from dspark.train.draft.types import drafter
from dspark.train.objective.metrics import SlotMetrics
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import Denominators
from dspark.train.objective.states import SlotStates
from dspark.train.optim.base import learning_rate
from dspark.train.run.setup import Run
from dspark.train.run.sound import largest


@dataclass(frozen=True, slots=True)
class Share:
    """This rank's share of a step, and what all ranks do: ``denominators``, ``rows`` and ``tokens``
    are of all ranks.
    """

    own: list[PackedRow]
    denominators: Denominators
    rows: int
    tokens: int
    stop: bool  # somebody was interrupted


def share(
    run: Run,
    take: Callable[[], list[PackedRow]],
    interrupted: Callable[[], bool],
    before_failing: Callable[[], None] = lambda: None,
) -> Share:
    """Take the next step's rows and exchange what the ranks must know about each other. A reading
    error on any rank raises on all, after ``before_failing()``, which may communicate since all
    ranks are alive. It is not called if a rank has died.
    """
    own: list[PackedRow] = []
    failed: Exception | None = None
    try:
        own = [] if interrupted() else take()
    except Exception as error:
        failed = error
    weights = Denominators(0.0, 0.0, 0.0)
    for row in own:
        weights = weights + Denominators.of(row, run.config.decay, run.to_draft)
    ce, l1, confidence, rows, tokens, stops, failures = run.world.sum(
        [
            weights.ce,
            weights.l1,
            weights.confidence,
            len(own),
            sum(row.tokens for row in own),
            interrupted(),
            failed is not None,
        ]
    )
    if failures and not stops:  # an interrupt may have killed a reader too: that is not a failure
        before_failing()
        run.world.agreed(lambda: _raise(failed))
    return Share(own, Denominators(ce, l1, confidence), int(rows), int(tokens), bool(stops))


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def step(
    run: Run, feed: Feed, part: Share, number: int, total: int, metrics: SlotMetrics | None
) -> tuple[Tensor, float]:
    """Do optimizer step ``number`` of ``total``; fills ``metrics`` if given.

    Returns float32[3] on the device (the gradient's norm of all ranks, this rank's part of the
    loss, the largest of its states), and the learning rate.
    """
    config, model = run.config, run.model
    loss = torch.zeros((), device=run.compute.device)
    states = [loss]  # the largest state of each row
    used = [row for row in part.own if row.slots]  # no anchor, nothing to learn
    if not used:
        run.optimizer.last_row()
    for i, batch in enumerate(feed.batches(used)):
        if i == len(used) - 1:
            run.optimizer.last_row()
        states.append(largest(batch))
        loss = loss + learn(run, batch, part.denominators, metrics)
    for batch in blanks(run, len(used)):  # never after a row, so it is the last pass
        nothing(model(batch, model.plan(batch, run.compute.backend))).backward()  # type: ignore[no-untyped-call]
    lr = learning_rate(
        number, total, config.lr, config.warmup_ratio, config.min_lr_ratio, config.lr_schedule
    )
    norm = run.optimizer.step(lr)
    feed.queued()
    return torch.stack([norm.float(), loss.float(), torch.stack(states).amax()]), lr


def learn(
    run: Run, batch: Batch, denominators: Denominators, metrics: SlotMetrics | None
) -> Tensor:
    """Run forward, objective and backward on one row; returns its part of the step's loss,
    detached.
    """
    states: SlotStates = run.model(batch, run.model.plan(batch, run.compute.backend))
    slots = drafter(run.config.speculator_type).slots(batch, states, run.config.decay)
    out = objective(slots, run.model.frozen_head, run.objective, denominators)
    out.loss.backward()  # type: ignore[no-untyped-call]
    if metrics is not None:
        with torch.no_grad():
            metrics.add(batch, slots, out)
    return out.loss.detach()


def blanks(run: Run, passed: int) -> Iterator[Batch]:
    """Return a batch of padding for a rank of a sharded model that has ``passed`` no row of a step:
    its first pass gathers weights and its last sums gradients, together with the other ranks.
    """
    if run.blank is not None and not passed:
        yield run.blank


def nothing(states: SlotStates) -> Tensor:
    """Return a loss of 0 that depends on everything a forward pass returns, so that its backward
    pass visits every parameter.
    """
    parts = [states.h, states.z, states.w2, states.confidence]
    return torch.stack([part[:0].sum().float() for part in parts if part is not None]).sum()
