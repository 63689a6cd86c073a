"""A row's gradient added to a step's: plain torch, and the kernel in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import torch

from dspark.train.ops.summed import add_to
from interpreted import interpreted


def test_the_first_replaces_and_the_others_add_in_float32() -> None:
    total = torch.full((3, 5), torch.nan)
    parts = torch.randn(3, 3, 5).bfloat16()
    for i, part in enumerate(parts):
        add_to(total, part, first=i == 0)
    assert torch.equal(total, parts[0].float() + parts[1].float() + parts[2].float())


def test_kernel_equals_plain() -> None:
    rows = interpreted(Path(__file__).with_name("summed_cases.py"))
    assert len(rows) == 8
    for row in rows:
        assert row["wrong"] == 0, row
