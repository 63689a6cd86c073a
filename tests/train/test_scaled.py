"""A matrix scaled into another: plain torch, and the kernel in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspark.train.ops.scaled import write_scaled
from interpreted import interpreted


@pytest.mark.parametrize("before", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [torch.float64, torch.float32, torch.bfloat16])
def test_rounds_once_and_stays_inside(before: torch.dtype, after: torch.dtype) -> None:
    source, scale = torch.randn(9, 5).to(before), torch.randn(())
    for factor in (None, scale):
        around = torch.randn(9, 12).to(after)
        want = around.clone()
        exact = source.to(torch.promote_types(before, torch.float32))
        want[:, 4:9] = exact if factor is None else exact * factor
        out = around[:, 4:9]
        assert write_scaled(out, source, factor) is out
        assert torch.equal(around, want)
        assert torch.equal(write_scaled(torch.empty(5, 9, dtype=after).T, source, factor), out)


def test_kernel_equals_plain() -> None:
    rows = interpreted(Path(__file__).with_name("scaled_cases.py"))
    assert len(rows) == 96
    for row in rows:
        assert row["wrong"] == 0, row
