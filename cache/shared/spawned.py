"""Processes of our own: they leave signals to their parent, and end at once when their work is done
or their parent is gone.
"""

from __future__ import annotations

import os
import signal
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess

from dspark.cache.shared.stopping import SIGNALS, end_with_parent, leave_to_parent


class SpawnedProcess(SpawnProcess):
    """A fresh process: CUDA and locks that threads hold do not survive a fork. A signal to the
    whole group does not end it, since its parent may need it to save what it has.
    """

    def start(self) -> None:
        """Raises OSError if the system starts none.

        It is born with signals blocked: while it imports, Ctrl-C would end it with a trace.
        """
        resource_tracker.ensure_running()  # where ``start`` does this, it unblocks signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        """End it, for which SIGTERM is not enough."""
        self.kill()

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        """Run all of the process, what is to be done at its end included, and end at once, as a
        forked process does. To take apart what it has imported takes Python 0.2 s of processor
        (docs/log/2026-11-27-ends-of-a-dump.md), and whoever waits for its processes waits for that.
        """
        leave_to_parent()
        code: int = super()._bootstrap(parent_sentinel)  # type: ignore[misc]
        os._exit(code)

    def run(self) -> None:
        end_with_parent()
        super().run()


class Spawning(SpawnContext):
    """Of ``multiprocessing``: starts such processes."""

    Process = SpawnedProcess
