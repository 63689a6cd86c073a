"""RoPE scaling of a draft: the supported kinds, their numbers, and their form in config.json. Only
kinds whose angles do not depend on the sequence length: keys are cached, so an angle that changes
later would be wrong. The frequencies are transformers' (``train/ops/rope.py``); vLLM computes the
same from the same keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dspark.cache.errors import DraftError, UsageError

# Kind -> what it must have, and what it may.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
}
PLAIN = "default"
# Said beside a scaling in config.json; the base has a home of its own
# (``cache.target.shape.rope_base``).
_BESIDE = ("rope_theta", "type", "rope_type")


def checked(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return ``scaling`` as ``DraftConfig`` keeps it: ``rope_type`` and its numbers; None for plain
    RoPE. Raises UsageError, naming the key.
    """
    if not scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type", PLAIN))
    if kind == PLAIN:
        return None
    if kind not in KINDS:
        raise UsageError(f"rope_type is {kind!r}; expected one of {', '.join((PLAIN, *KINDS))}")
    needed, allowed = KINDS[kind]
    own = {k: v for k, v in scaling.items() if k not in _BESIDE and v is not None}
    if missing := [key for key in needed if key not in own]:
        raise UsageError(f"rope_type {kind} needs {', '.join(missing)}")
    if unknown := sorted(set(own) - set(needed) - set(allowed)):
        raise UsageError(
            f"rope_type {kind} has no {', '.join(unknown)}; expected "
            f"{', '.join((*needed, *allowed))}"
        )
    for key, value in own.items():
        if key == "truncate":
            if not isinstance(value, bool):
                raise UsageError(f"RoPE {key} is {value!r}; expected true or false")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UsageError(f"RoPE {key} is {value!r}; expected a positive number")
    if own["factor"] < 1:
        raise UsageError(f"RoPE factor is {own['factor']}; expected 1 or more")
    return {"rope_type": kind, **own}


def parse(text: str) -> dict[str, Any] | None:
    """Parse ``--rope-scaling``: a JSON object, or ``none``. Raises UsageError."""
    if text == "none":
        return None
    try:
        value = json.loads(text)
    except ValueError as wrong:
        raise UsageError(
            f"--rope-scaling is not JSON: {wrong}; expected none or an object such as "
            '{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": '
            "8192}"
        ) from wrong
    if not isinstance(value, dict) or "rope_type" not in value:
        raise UsageError(
            f"--rope-scaling is {text}; expected an object with rope_type, one of "
            f"{', '.join(KINDS)}"
        )
    if "rope_theta" in value:
        raise UsageError(
            "--rope-scaling has rope_theta; remove it: a draft uses its target's RoPE base"
        )
    return checked(value)


def read(flat: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the scaling that a flat config.json describes, in either spelling. Raises DraftError."""
    scaling = flat.get("rope_parameters") or flat.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise DraftError(f"config.json has RoPE {scaling!r}; expected an object")
    try:
        return checked(scaling)
    except UsageError as wrong:
        raise DraftError(f"config.json has RoPE {scaling!r}: {wrong}") from wrong


def reach(scaling: Mapping[str, Any] | None, positions: int) -> int:
    """Return how many positions vLLM's table for a draft with ``max_position_embeddings`` =
    ``positions`` holds.
    """
    if scaling is None or scaling["rope_type"] == "llama3":
        return positions
    base = scaling.get("original_max_position_embeddings", positions)
    return int(base * scaling["factor"])
