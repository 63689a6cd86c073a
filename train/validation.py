"""The held-out rows of a training, judged with the same anchors every time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from dspark.train.data.batch import Batch
from dspark.train.data.row import PackedRow
from dspark.train.data.stream import VALIDATION_EPOCH
from dspark.train.evaluate import ANCHORS_AT_ONCE, evaluate, walked
from dspark.train.objective.metrics import Score
from dspark.train.run.setup import Run
from dspark.train.step import blanks


def validate(run: Run) -> Score:
    """Compute metrics on the held-out prompts, with the same anchors every time. Each rank scores
    its rows.
    """
    compute, config = run.compute, run.config
    score = evaluate(
        run.model,
        run.cache,
        _held_out(run),
        device=compute.device,
        dtype=compute.dtype,
        decay=config.decay,
        backend=compute.backend,
        reduce=run.world.sum_,
    )
    if not config.val_walk_rows:
        return score
    # A sharded model's weights are gathered by now, so ranks may differ in the number of passes.
    walk = walked(
        run.model,
        run.cache,
        itertools.islice(_rows_of_this_rank(run), -(-config.val_walk_rows // run.world.size)),
        device=compute.device,
        dtype=compute.dtype,
        backend=compute.backend,
        anchors_at_once=config.max_anchors or ANCHORS_AT_ONCE,
        pad=run.stream.pad,
    )
    run.world.sum_(walk.sums)
    return {**score, **walk.result()}


def _rows_of_this_rank(run: Run) -> Iterator[PackedRow]:
    assert run.validation is not None
    for rows in run.validation.steps_from(
        VALIDATION_EPOCH, rank=run.world.rank, world=run.world.size
    ):
        yield from rows


def _held_out(run: Run) -> Iterator[PackedRow | Batch]:
    stream = run.validation
    assert stream is not None
    for rows in stream.steps_from(VALIDATION_EPOCH, rank=run.world.rank, world=run.world.size):
        yield from rows
        yield from blanks(run, sum(row.slots > 0 for row in rows))
