"""Metrics of a draft against a table by hand, and against a loop."""

from __future__ import annotations

import pytest
import torch

from core_cases import BLOCK, small_batch, small_draft
from dspark.train.data.batch import Batch
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.metrics import BINS, SlotMetrics, auroc, expected_calibration_error
from dspark.train.objective.objective import ObjectiveOutput, objective
from dspark.train.objective.slots import Denominators, SlotInputs
from dspark.train.objective.states import FrozenHead


def scored(batch: Batch) -> tuple[SlotInputs, ObjectiveOutput]:
    model = small_draft()
    with torch.no_grad():
        slots = SlotInputs.gather(batch, model(batch, model.plan(batch)), 4.0)
        out = objective(slots, model.frozen_head, ObjectiveConfig(), Denominators(1, 1, 1))
    return slots, out


def by_hand() -> SlotMetrics:
    """Two blocks of two slots; the second block is cut after one. Vocabulary of two, draft always
    (1/2, 1/2).
    """
    import numpy as np

    batch = Batch.build(
        input_ids=np.array([0, 1, 0, 1]),
        loss_mask=np.ones(4, dtype=np.bool_),
        doc=np.zeros(4, dtype=np.int32),
        aux=torch.zeros(4, 1, 2),
        last=torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, 1.0]]),
        anchors=np.array([0, 2]),
        block_size=2,
    )
    at = batch.slots
    slots = SlotInputs(
        h=torch.zeros(3, 2),
        z=None,
        w2=None,
        confidence=torch.zeros(3),
        # Logits whose softmax is (3/4, 1/4), (1/2, 1/2), (1, 0).
        target=torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 1e-30]]).log(),
        labels=batch.label_ids.flatten()[at],
        weight=torch.tensor([1.0, 0.5, 1.0]),
    )
    eye = torch.eye(2)
    out = objective(slots, FrozenHead(eye, eye), ObjectiveConfig(), Denominators(1, 1, 1))
    metrics = SlotMetrics(2)
    metrics.add(batch, slots, out)
    return metrics


def test_table_by_hand() -> None:
    score = by_hand().result()
    # accept: block 0 = 3/4, 1; block 1 = 1/2 and cut.
    assert score["accept_rate"] == pytest.approx([0.625, 1.0])
    assert score["mean_accepted_length"] == pytest.approx(1 + 0.75 + 0.75)
    assert score["ce_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert score["l1_loss"] == pytest.approx((1 * 0.5 + 0.5 * 0 + 1 * 1.0) / 2.5)
    assert score["confidence_abs_error"] == pytest.approx((0.25 + 0.5 * 0.5 + 0.0) / 2.5)
    # argmax of ties is the first: draft always says 0, the target 0 in all three.
    assert score["position_accuracy"] == [1.0, 1.0]
    assert score["full_accuracy"] == 1.0
    assert (score["blocks"], score["full_blocks"], score["slots"]) == (2, 1, 3)
    # All guesses are 1/2 in one bin; mean acceptance is 3/4.
    assert score["confidence_ece"] == pytest.approx(0.25)
    assert score["confidence_auroc"] == pytest.approx(0.5)


def test_against_a_loop_and_padding_changes_nothing() -> None:
    batch = small_batch()
    slots, out = scored(batch)
    metrics = SlotMetrics(BLOCK)
    metrics.add(batch, slots, out)
    score = metrics.result()
    accept = dict(zip(batch.slots.tolist(), out.accept.tolist(), strict=True))
    lengths, sums, counts = [], [0.0] * BLOCK, [0] * BLOCK
    for a in range(batch.anchors.shape[0]):
        run, length = 1.0, 1.0
        for k in range(BLOCK):
            if a * BLOCK + k in accept:
                sums[k] += accept[a * BLOCK + k]
                counts[k] += 1
                run *= accept[a * BLOCK + k]
                length += run
        if bool(batch.counted[a].all()):
            lengths.append(length)
    assert lengths
    assert score["mean_accepted_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert score["accept_rate"] == pytest.approx([s / c for s, c in zip(sums, counts, strict=True)])
    assert score["blocks"] == int(batch.anchor_valid.sum())
    assert score["slots"] == len(accept)


def test_rows_merge() -> None:
    batches = [small_batch(s) for s in (5, 6)]
    together, apart = SlotMetrics(BLOCK), [SlotMetrics(BLOCK), SlotMetrics(BLOCK)]
    for batch, part in zip(batches, apart, strict=True):
        slots, out = scored(batch)
        together.add(batch, slots, out)
        part.add(batch, slots, out)
    apart[0].merge(apart[1])
    assert torch.equal(apart[0].sums, together.sums)


def test_nothing_counted_is_none_not_zero() -> None:
    score = SlotMetrics(3).result()
    assert score["mean_accepted_length"] is None
    assert score["confidence_ece"] is None
    assert score["blocks"] == 0


def test_calibration_helpers() -> None:
    bins = torch.zeros(3, BINS, dtype=torch.float64)
    # 10 guesses of .9 of which 8 accepted, 10 of .2 of which 2 accepted.
    bins[:, 90] = torch.tensor([10.0, 9.0, 8.0])
    bins[:, 20] = torch.tensor([10.0, 2.0, 2.0])
    assert expected_calibration_error(bins) == pytest.approx(0.5 * 0.1)
    # pairs: 8 accepted high x (8 rejected low + half of 2) + 2 accepted low x half of 8.
    assert auroc(bins) == pytest.approx((8 * 9 + 2 * 4) / 100)
    bins[2] = bins[0]
    assert auroc(bins) is None
