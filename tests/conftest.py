"""For all tests: the real small target, and long files first."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Files that take longest, each on one process: begun first, so that no process is left alone with
# one at the end.
LONG = (
    "test_engine_vllm.py",
    "test_main_job.py",
    "test_ranks.py",
    "test_run.py",
    "test_pipeline.py",
    "test_format2.py",
    "test_loop.py",
    "test_serving.py",
)


def pytest_configure() -> None:
    """Hear Ctrl-C, as tests of it expect: a shell's background job is born deaf to SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of ``LONG`` to the front; the order within a file stays."""
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real SmolLM2-135M target that ``make target`` builds."""
    path = Path(os.environ.get("DSPARK_SMOLLM2", Path(__file__).parents[1] / ".work" / "smollm2"))
    assert (path / "model.safetensors").is_file(), f"{path}: no target there; run `make target`"
    return path
