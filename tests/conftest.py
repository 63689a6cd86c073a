"""Fixtures for all tests: one thread a test process, and the real small target."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real SmolLM2-135M target that ``make target`` builds."""
    path = Path(os.environ.get("DSPARK_SMOLLM2", Path(__file__).parents[1] / ".work" / "smollm2"))
    assert (path / "model.safetensors").is_file(), f"{path}: no target there; run `make target`"
    return path
