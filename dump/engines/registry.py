"""The engines by name: which exist, which one ``auto`` chooses, and how one is started.

A new engine is one module with a ``start(run)`` function and one line in ``ENGINES``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import UsageError
from dspark.dump.engines.versions import VLLM_BUILDS, installed

if TYPE_CHECKING:
    from dspark.dump.engines.engine import Engine, EngineRun


@dataclass(frozen=True, slots=True)
class EngineKind:
    """``start``: ``module:function`` that takes an ``EngineRun``; ``package``: what it imports;
    ``builds``: the distributions that provide it. ``lookahead``: positions that it needs after the
    longest sample. ``refuses``: ``module:function`` that takes a target's architectures and the
    device, and says why not, before weights are read.
    """

    start: str
    package: str
    builds: tuple[str, ...]
    lookahead: int = 0
    install: str = ""
    refuses: str = ""

    @property
    def available(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def why_not(self, architectures: Sequence[str], device: str) -> str | None:
        """Say why it cannot run a target of these architectures; None if it can, or if they are
        unknown.
        """
        if not (self.refuses and architectures):
            return None
        answer: Callable[[Sequence[str], str], str | None] = _resolve(self.refuses)
        return answer(architectures, device)


ENGINES: dict[str, EngineKind] = {
    "transformers": EngineKind("dspark.dump.engines.hf:start", "transformers", ("transformers",)),
    "vllm": EngineKind(
        "dspark.dump.engines.vllm.engine:start",
        "vllm",
        VLLM_BUILDS,
        1,
        "pip install vllm",
        "dspark.dump.engines.vllm.launch:why_not",
    ),
}
DEFAULT = "transformers"


def engine_kind(name: str) -> EngineKind:
    """Return the engine called ``name``; raises UsageError for another name."""
    if name not in ENGINES:
        raise UsageError(f"--engine {name}: no such engine. Engines: auto, {', '.join(ENGINES)}.")
    return ENGINES[name]


def engine_version(name: str) -> str:
    """Version of the package that runs the target."""
    found = installed(engine_kind(name).builds)
    if found is None:
        raise UsageError(f"--engine {name}: the package is not installed.")
    return found


def choose_engine(
    name: str, device: str, architectures: Sequence[str] = ()
) -> tuple[str, str, str | None]:
    """Choose engine and device; also says why not the one that ``auto`` prefers. ``auto``: vLLM if
    there is a GPU and vLLM is installed and returns the states of ``architectures``; else
    transformers.
    """
    from dspark.cache.shared.process import device_type

    device = device_type(device)
    if name == "auto":
        if not (ENGINES["vllm"].available and device == "cuda"):
            return DEFAULT, device, None
        why = ENGINES["vllm"].why_not(architectures, device)
        return (DEFAULT if why else "vllm"), device, why
    kind = engine_kind(name)
    if not kind.available:
        how = f"{kind.install}, or use" if kind.install else "install it, or use"
        raise UsageError(
            f"--engine {name}: {kind.package} is not installed here: {how} --engine {DEFAULT}."
        )
    why = kind.why_not(architectures, device)
    if why:
        raise UsageError(f"--engine {name}: {why}. Use --engine {DEFAULT}.")
    return name, device, None


def choose_dtype(dtype: str, device: str) -> str:
    """``auto``: bfloat16 on a GPU, float32 on a CPU."""
    if dtype == "auto":
        return "bfloat16" if device == "cuda" else "float32"
    return dtype


def load_engine(name: str, run: EngineRun) -> Engine:
    """Start engine ``name``: its weights are read here."""
    start: Callable[[EngineRun], Engine] = _resolve(engine_kind(name).start)
    return start(run)


def _resolve(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
