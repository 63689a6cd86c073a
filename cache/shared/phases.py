"""Tell how long each phase of a work takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Phases:
    """``seconds`` and ``times`` by name of a phase, in the order of their first beginnings.

    ``device``: its queued work belongs to the phase that queued it (None: there is none).
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.times: dict[str, int] = {}
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the ``with`` block to phase ``name``; phases are not nested."""
        self.seconds.setdefault(name, 0.0)
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - began
        self.times[name] = self.times.get(name, 0) + 1

    def _wait(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)

    def __str__(self) -> str:
        """Say, for example, ``moments 0.41, step 0.30 (5 times)``."""
        return ", ".join(
            f"{name} {self.seconds[name]:.2f}" + (f" ({times} times)" if times > 1 else "")
            for name, times in self.times.items()
        )
