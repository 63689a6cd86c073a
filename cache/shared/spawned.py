"""A process of our own that ends at once when its work is done."""

from __future__ import annotations

import os
from multiprocessing.context import SpawnContext, SpawnProcess


class SpawnedProcess(SpawnProcess):
    """A fresh process: CUDA and locks that threads hold do not survive a fork."""

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        """Run all of the process, what is to be done at its end included, and end at once, as a
        forked process does. To take apart what it has imported takes Python 0.2 s of processor
        (docs/log/2026-11-27-ends-of-a-dump.md), and whoever waits for its processes waits for that.
        """
        code: int = super()._bootstrap(parent_sentinel)  # type: ignore[misc]
        os._exit(code)


class Spawning(SpawnContext):
    """Of ``multiprocessing``: starts such processes."""

    Process = SpawnedProcess
