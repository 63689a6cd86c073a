"""A row's buffer gives back what was put in; the feed hands rows over in order and keeps an error
until it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import stores
from core_cases import small_draft
from dspark.cache.errors import DamagedCacheError
from dspark.cache.reader import open as open_store
from dspark.train.data.feed import Feed
from dspark.train.data.row import ALIGN, PackedRow, blank
from dspark.train.data.stream import Stream
from dspark.train.draft.attention import MaskTables
from dspark.train.draft.sight import Sight
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import Denominators, SlotInputs
from dspark.train.step import nothing

LENGTHS = [60, 80, 30, 3]


def stream(folder: Path, *, pad: bool = False, tables: MaskTables | None = None) -> Stream:
    if not (folder / "hs.zarr").exists():
        stores.write_store(folder / "hs.zarr", LENGTHS)
    cache = open_store(folder / "hs.zarr")
    return Stream(
        cache,
        np.arange(4),
        seed=0,
        total_seq_len=100,
        rows_per_step=2,
        block_size=3,
        max_anchors=8,
        pad=pad,
        tables=tables,
    )


@pytest.mark.parametrize("pad", [False, True])
def test_a_placed_row_holds_the_store_s_states(tmp_path: Path, pad: bool) -> None:
    made = stream(tmp_path, pad=pad)
    cache = made.cache
    rows = next(made.steps_from(0))
    assert len(rows) == 2
    for row, members in zip(rows, made.plan(0), strict=False):
        batch = row.place(cache, torch.device("cpu"), torch.float32)
        samples = [cache[i] for i in members]
        used = sum(len(s.input_ids) for s in samples)
        assert row.tokens == used
        assert row.slots == int(batch.counted.sum()) == batch.slots.numel()
        assert batch.input_ids.shape[0] == (100 if pad else used)
        np.testing.assert_array_equal(
            batch.input_ids[:used], np.concatenate([s.input_ids for s in samples])
        )
        np.testing.assert_array_equal(batch.aux[:used], np.concatenate([s.aux for s in samples]))
        np.testing.assert_array_equal(
            batch.last, np.concatenate([s.last[s.last_mask] for s in samples])
        )
        assert not batch.aux[used:].any()
        assert torch.equal(batch.target_at_host, batch.target_at)
        assert torch.equal(
            batch.target_rows[batch.target_at], batch.target_row.flatten()[batch.slots]
        )


@pytest.mark.parametrize("pad", [False, True])
def test_the_memory_of_the_largest_row_is_known_beforehand(tmp_path: Path, pad: bool) -> None:
    """Slots have an eighth more, so none is enlarged."""
    made = stream(tmp_path, pad=pad)
    largest = max(row.data.shape[0] for step in made.steps_from(0) for row in step)
    need = made.need(0)
    assert need.row - 32 * ALIGN < largest < need.row + 32 * ALIGN
    assert need.held == 5
    assert made.need(0, world=2).held == 3


def test_the_feed_keeps_order_and_errors(tmp_path: Path) -> None:
    made = stream(tmp_path)
    steps = list(made.steps_from(0))
    placed: list[PackedRow] = []

    def rows() -> Iterator[list[PackedRow]]:
        yield from steps
        raise DamagedCacheError("part 3")

    def place(row: PackedRow) -> object:
        placed.append(row)
        return row.place(made.cache, torch.device("cpu"), torch.float32)

    feed = Feed(rows(), place, torch.device("cpu"))  # type: ignore[arg-type]
    for step in steps:
        taken = feed.take()
        assert taken is step
        used = [row for row in taken if row.slots]
        for row, batch in zip(used, feed.batches(used), strict=True):
            torch.testing.assert_close(batch.input_ids, row.batch.input_ids)
        feed.queued()
        feed.fetch()
    assert [id(r) for r in placed] == [id(r) for step in steps for r in step if r.slots], (
        "each row once"
    )
    assert feed.waited > 0
    with pytest.raises(DamagedCacheError, match="part 3"):
        feed.take()


def test_a_blank_row_gives_zero_gradients_everywhere() -> None:
    model = small_draft()
    batch = blank(5, 2, 4, 2, 32, torch.device("cpu"), torch.float32)
    loss = nothing(model(batch, model.plan(batch)))
    assert loss == 0
    loss.backward()  # type: ignore[no-untyped-call]
    for name, p in model.trained():
        assert p.grad is not None, name
        assert not p.grad.any(), name
    slots = SlotInputs.gather(batch, model(batch, model.plan(batch)), 4.0)
    assert objective(slots, model.frozen_head, ObjectiveConfig(), Denominators(1, 1, 1)).loss == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_readers_make_the_tables_of_the_mask(tmp_path: Path, workers: int) -> None:
    tables = MaskTables(3, (Sight(), Sight(2)))
    made = stream(tmp_path, pad=True, tables=tables)
    for row in next(made.steps_from(0, workers=workers)):
        batch = row.place(made.cache, torch.device("cpu"), torch.float32)
        want = tables(batch.doc, batch.anchors, batch.anchor_valid)
        assert len(batch.tables) == 2
        for found, expected in zip(batch.tables, want, strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[n], expected[n]) for n in expected)
        assert [list(of) for of in batch.to("cpu").tables] == [list(of) for of in want]
        # of other anchors they would be wrong
        assert batch.with_anchors(row.batch, np.array([1])).tables == ()
