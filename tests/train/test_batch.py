"""Labels, previous tokens and target rows of a packed row, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core_cases import small_batch
from dspark.train.data.batch import Batch


def by_hand() -> Batch:
    """Document 0 = tokens 10..14, all supervised but the first; document 1 = tokens 20..22; one
    padding token.
    """
    return Batch.build(
        input_ids=np.array([10, 11, 12, 13, 14, 20, 21, 22, 0]),
        loss_mask=np.array([0, 1, 1, 1, 1, 1, 1, 1, 0], dtype=np.bool_),
        doc=np.array([0, 0, 0, 0, 0, 1, 1, 1, -1], dtype=np.int32),
        aux=torch.zeros(9, 1, 2),
        last=torch.arange(10.0).view(5, 2),
        anchors=np.array([1, 3, 5]),
        block_size=3,
        pad_anchors_to=4,
    )


def test_labels_previous_tokens_and_target_rows() -> None:
    b = by_hand()
    assert b.counted.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert b.slots.tolist() == [0, 1, 2, 3, 6, 7]
    assert b.label_ids.flatten()[b.slots].tolist() == [12, 13, 14, 14, 21, 22]
    assert b.prev_ids.flatten()[b.slots].tolist() == [11, 12, 13, 13, 20, 21]
    assert b.last_index.tolist() == [-1, 0, 1, 2, -1, 3, 4, -1, -1]
    assert b.target_row.flatten()[b.slots].tolist() == [0, 1, 2, 2, 3, 4]
    assert b.block_position.tolist() == [[1, 2, 3], [3, 4, 5], [0, 1, 2], [0, 1, 2]]
    assert b.anchor_valid.tolist() == [True, True, True, False]


def test_slots_are_in_the_order_of_their_target_rows() -> None:
    """Anchors 1, 2 and 5 of a text of 9 supervised tokens, blocks of 4; slot k of anchor a is held
    to the state of a+k.
    """
    b = Batch.build(
        input_ids=np.arange(9),
        loss_mask=np.ones(9, dtype=np.bool_),
        doc=np.zeros(9, dtype=np.int32),
        aux=torch.zeros(9, 1, 2),
        last=torch.zeros(8, 2),
        anchors=np.array([1, 2, 5]),
        block_size=4,
    )
    # Positions 1 2 3 4 | 2 3 4 5 | 5 6 7, of which the last has no label for its fourth slot.
    assert b.counted.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert b.slots.tolist() == [0, 1, 4, 2, 5, 3, 6, 7, 8, 9, 10]
    assert b.target_rows.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert b.target_at.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6]
    values = 10 * (b.slots // 4) + b.slots % 4 + 1
    assert b.in_blocks(values).tolist() == [[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 0]]
    assert b.to("meta").target_at_host.tolist() == b.target_at.tolist()


def test_target_rows_of_the_slots() -> None:
    for seed in range(20):
        b = small_batch(seed)
        assert torch.equal(b.target_rows[b.target_at], b.target_row.flatten()[b.slots])
        assert torch.equal(b.slots.sort().values, b.counted.flatten().nonzero()[:, 0])
        assert torch.equal(b.target_rows, b.target_rows.unique())
        assert set(b.target_at.diff().tolist()) <= {0, 1}


def test_every_counted_slot_has_a_stored_state() -> None:
    for seed in range(20):
        b = small_batch(seed)
        rows = b.target_row[b.counted]
        assert rows.numel() > 0
        assert int(rows.min()) >= 0
        assert int(rows.max()) < b.last.shape[0]


def test_states_that_do_not_fit_the_mask_are_refused() -> None:
    with pytest.raises(AssertionError, match="last states"):
        Batch.build(
            input_ids=np.arange(3),
            loss_mask=np.ones(3, dtype=np.bool_),
            doc=np.zeros(3, dtype=np.int32),
            aux=torch.zeros(3, 1, 2),
            last=torch.zeros(3, 2),
            anchors=np.array([0]),
            block_size=2,
        )


def test_to_casts_states_only() -> None:
    b = by_hand().to("cpu", torch.bfloat16)
    assert b.last.dtype == b.aux.dtype == torch.bfloat16
    assert b.input_ids.dtype == torch.int64
    assert b.counted.dtype == torch.bool
