"""The held-out rows of a training, judged with the same anchors every time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from dspark.train.data.batch import Batch
from dspark.train.data.held import HeldOut
from dspark.train.data.row import PackedRow
from dspark.train.evaluate import ANCHORS_AT_ONCE, evaluate, walked
from dspark.train.objective.metrics import Score
from dspark.train.run.setup import Run
from dspark.train.step import blanks


def validate(run: Run, held_out: HeldOut) -> Score:
    """Compute metrics on the held-out prompts, with the same anchors every time. Each rank scores
    its rows.
    """
    compute, config = run.compute, run.config
    score = evaluate(
        run.model,
        run.cache,
        _with_blanks(run, held_out),
        device=compute.device,
        dtype=compute.dtype,
        decay=config.decay,
        backend=compute.backend,
        reduce=run.world.sum_,
    )
    if not config.val_walk_rows:
        return score
    # A sharded model's weights are gathered by now, so ranks may differ in the number of passes.
    rows = itertools.chain.from_iterable(held_out)
    walk = walked(
        run.model,
        run.cache,
        itertools.islice(rows, -(-config.val_walk_rows // run.world.size)),
        device=compute.device,
        dtype=compute.dtype,
        backend=compute.backend,
        anchors_at_once=config.max_anchors or ANCHORS_AT_ONCE,
        pad=run.stream.pad,
    )
    run.world.sum_(walk.sums)
    return {**score, **walk.result()}


def _with_blanks(run: Run, held_out: HeldOut) -> Iterator[PackedRow | Batch]:
    for rows in held_out:
        yield from rows
        yield from blanks(run, sum(row.slots > 0 for row in rows))
