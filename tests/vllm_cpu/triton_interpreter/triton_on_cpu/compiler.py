"""The compiler half: there is none. Reaching it means that the interpreter is not switched on."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpreterOnly(BaseBackend):
    """Refuses to compile; Triton wants a compiler class next to every driver."""

    binary_ext = "none"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreter-only"

    def parse_options(self, options: dict[str, Any]) -> object:
        return options

    def add_stages(self, stages: dict[str, Any], options: object, language: object = None) -> None:
        raise RuntimeError(
            "triton_on_cpu compiles nothing: set TRITON_INTERPRET=1 before triton is imported"
        )

    def load_dialects(self, context: object) -> None:
        """No dialects: nothing is lowered."""

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}
