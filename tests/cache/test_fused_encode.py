"""The encoding kernel in Triton's interpreter, against plain torch: the same bytes, the same
refusals.
"""

from __future__ import annotations

from pathlib import Path

from interpreted import interpreted


def test_kernel_and_plain_torch_give_the_same_bytes() -> None:
    rows = interpreted(Path(__file__).with_name("encode_cases.py"))
    assert len(rows) == 7 * 3 * 2 * 2 + 2 + 1
    assert [row for row in rows if not row["same"]] == []
    assert rows[-1]["trusted"]
