"""The driver half of the backend: device 0 is the CPU, time is not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class CpuDriver(DriverBase):
    """What Triton and vLLM ask of a driver before the interpreter takes over."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        def once(
            call: Callable[[], object], *, quantiles: Sequence[float] = (0.5,), **_: Any
        ) -> list[float]:
            """Autotuning would time every configuration; in the interpreter the first is as good as
            any.
            """
            call()
            return [1.0] * len(quantiles)

        return once
