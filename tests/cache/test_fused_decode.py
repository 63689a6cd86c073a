"""The decode kernel in Triton's interpreter, against plain torch: the same bits."""

from __future__ import annotations

from pathlib import Path

from interpreted import interpreted


def test_kernel_and_plain_torch_give_the_same_bits() -> None:
    rows = interpreted(Path(__file__).with_name("fused_cases.py"))
    assert len(rows) == 6 * 4 * 2 * 2
    assert [row for row in rows if not row["same"]] == []
