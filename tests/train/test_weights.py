"""D-PACE weights: by hand, as a derivative, and inside a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core_cases import small_batch
from dspark.cache import errors
from dspark.train import weights
from dspark.train.config import TrainConfig
from dspark.train.objective import ObjectiveConfig, SlotInputs
from dspark.train.weights import dpace, reweighted


def test_a_slot_weighs_what_its_log_acceptance_adds_to_the_expected_length() -> None:
    accept = torch.tensor([[0.8, 0.5, 0.1], [0.6, 0.9, 0.7]], dtype=torch.float64)
    counted = torch.tensor([[True, True, True], [True, True, False]])
    a, b, c = 0.9, 0.75, 0.55
    expected = [[a + a * b + a * b * c, a * b + a * b * c, a * b * c], [0.8 + 0.8 * 0.95, 0.8 * 0.95, 0.0]]
    torch.testing.assert_close(dpace(accept, counted), torch.tensor(expected, dtype=torch.float64))
    logs = accept[:1].log().requires_grad_()
    logs.exp().cumprod(1).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(dpace(accept[:1], counted[:1], smoothing=0.0), logs.grad)


def test_a_row_keeps_the_sum_of_its_weights_and_blocks_that_get_far_weigh_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = small_batch(0)
    count = batch.slots.shape[0]
    block = batch.slots // batch.block_size
    accept = (block % 2).double()  # every other block is always accepted, the others never

    class Output:
        pass

    output: Any = Output()
    output.accept = accept
    monkeypatch.setattr(weights, "objective", lambda *unused: output)
    fixed = torch.rand(count, dtype=torch.float64)
    empty: Any = None
    slots = SlotInputs(**{**dict.fromkeys(SlotInputs.__dataclass_fields__, empty), "weight": fixed})
    found = reweighted(batch, slots, empty, ObjectiveConfig()).weight
    assert float(found.sum()) == pytest.approx(float(fixed.sum()))
    first = batch.slots % batch.block_size == 0
    full = batch.counted.all(1)[block]
    assert found[first & full & (accept == 1)].min() > found[first & full & (accept == 0)].max()


def test_other_names_are_refused() -> None:
    with pytest.raises(errors.UsageError, match="expected decay or dpace"):
        TrainConfig(cache="", slot_weights="reach")
