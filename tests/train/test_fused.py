"""The Triton kernel of the objective in Triton's interpreter, against plain torch in float64."""

from __future__ import annotations

from pathlib import Path

from interpreted import interpreted


def test_fused_equals_plain() -> None:
    rows = interpreted(Path(__file__).with_name("fused_cases.py"))
    assert len(rows) == 12  # with and without the divergence
    for row in rows:
        assert row["ce"] < 2e-6, row
        assert row["l1"] < 2e-6, row
        assert row["kl"] < 1e-5, row
        assert row["gradient"] < 1e-6, row
        assert row["wrong_hits"] == 0, row
