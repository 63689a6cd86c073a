"""What Triton would compile kernels for, told without a GPU.

A variant of a kernel is what its binder returns for a launch: dtypes, constants, and what it reads
off the values of arguments, such as a number that is 1 or a multiple of 16. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

TARGET = "cuda", 90, 32  # an H100

Variant = tuple[tuple[str, Any], ...]  # of each argument, its type and what is known of its value


class Recorder:
    """Stands for a kernel: notes what a launch would need compiled, then calls ``instead`` with the
    arguments by name.
    """

    def __init__(self, kernel: Any, instead: Callable[..., None] = lambda **of: None) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        self.instead, self.cache_key = instead, kernel.cache_key
        self.found: set[Variant] = set()
        backend = make_backend(GPUTarget(*TARGET))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            bound, said, _ = self.bind(*args, **named)
            self.found.add(tuple(tuple(one) for one in said))
            self.instead(**bound)

        return launch


def recording(
    patch: pytest.MonkeyPatch, module: ModuleType, instead: dict[str, Callable[..., None]]
) -> Callable[[Callable[[], object]], set[tuple[str, Variant]]]:
    """Replace the kernels of ``module`` by what ``instead`` has under their names; returns a
    function that tells the variants that some work needs.
    """
    recorders = {name: Recorder(getattr(module, name), do) for name, do in instead.items()}
    for name, recorder in recorders.items():
        patch.setattr(module, name, recorder)

    def variants(work: Callable[[], object]) -> set[tuple[str, Variant]]:
        for recorder in recorders.values():
            recorder.found.clear()
        work()
        return {(name, key) for name, r in recorders.items() for key in r.found}

    return variants
