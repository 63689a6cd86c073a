"""``sitecustomize`` of a carried vLLM (``carry_vllm.py``): modules that vLLM imports and a dump
never uses.

Real modules win: this finder comes last. A stub's attributes are classes, so that annotations and
subclasses work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

STUBS = ("cv2", "mistral_common", "llguidance", "numba", "mcp", "anthropic", "pycountry", "uvloop")


class Any_(type):
    """A class that has every attribute, can be subscripted and joined by ``|``."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return made(name)

    def __getitem__(cls, key: Any) -> Any:
        return cls


def made(name: str) -> Any:
    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        del self, args, kwargs

    return Any_(name, (), {"__init__": start})


class Stub(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return made(name)


def asked_by_vllm() -> bool:
    """Whether the import is written in vLLM: other packages ask whether there is a module, and do
    without.
    """
    frame = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and "/vllm/" in frame.f_code.co_filename


class Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        del path, target
        if fullname.split(".", maxsplit=1)[0] not in STUBS or not asked_by_vllm():
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        del module


sys.meta_path.append(Finder())
