"""The options a user may pass on to an engine, validated without importing it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dspark.cache.errors import UsageError

# arguments of ``vllm.LLM`` that the dump sets
OURS = (
    "model",
    "dtype",
    "max_model_len",
    "speculative_config",
    "kv_transfer_config",
    "skip_tokenizer_init",
    "tensor_parallel_size",
    "data_parallel_size",
    "trust_remote_code",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """``tensor_parallel``, ``data_parallel``: GPUs per engine, and number of engines; None = by the
    target's size. ``arguments``: further arguments of the engine, by name. ``trust_remote_code``:
    run the target's own code.
    """

    tensor_parallel: int | None = None
    data_parallel: int | None = None
    arguments: tuple[tuple[str, Any], ...] = ()
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for flag, value in (
            ("--tensor-parallel-size", self.tensor_parallel),
            ("--data-parallel-size", self.data_parallel),
        ):
            if value is not None and not 1 <= value <= 1024:
                raise UsageError(f"{flag}: found {value}, expected 1 to 1024.")
        taken = sorted({name for name, _ in self.arguments} & set(OURS))
        if taken:
            raise UsageError(
                f"--engine-arg {taken[0]}: the dump sets this itself. Related flags: "
                "--tensor-parallel-size, --data-parallel-size, --seq-length, --dtype, "
                "--trust-remote-code."
            )

    def only_vllm(self, engine: str) -> list[str]:
        """Return the given flags that only vLLM supports."""
        found = [
            ("--tensor-parallel-size", self.tensor_parallel),
            ("--data-parallel-size", self.data_parallel),
            ("--engine-arg", self.arguments or None),
        ]
        return [] if engine == "vllm" else [flag for flag, value in found if value is not None]


NO_OPTIONS = EngineOptions()


def parse_arguments(given: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """``("max_num_seqs=64", "quantization=fp8")`` -> names as vLLM's Python has them, values parsed
    as JSON if they are JSON.
    """
    out: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name.isidentifier():
            raise UsageError(
                f"--engine-arg {text}: expected KEY=VALUE, KEY an argument of vllm.LLM: "
                "max_num_seqs=64."
            )
        if name in out:
            raise UsageError(f"--engine-arg {name}: given twice.")
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return tuple(out.items())
