"""Layers of a target: its shapes, and whether ids fit them. Which layers a draft reads:
``cache/target/taps.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark.cache.errors import UsageError
from dspark.cache.target.taps import BOTH


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What a plan needs to know about a target: H, V, number of decoder layers, longest sequence it
    takes.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    max_positions: int | None


def check_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return ``layers`` (output convention) if they are in range, sorted and distinct."""
    ids = [i + 1 for i in layers]
    named = (
        f"--layers {','.join(map(str, layers))} (= --target-layer-ids {','.join(map(str, ids))})"
    )
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong:
        raise UsageError(
            f"{named}: {wrong[0]} is out of range: the target has {num_layers} layers, so "
            f"--layers takes 0 to {num_layers - 1} "
            f"and --target-layer-ids 1 to {num_layers}. {BOTH}."
        )
    if list(layers) != sorted(set(layers)):
        what = "duplicated" if len(set(layers)) < len(layers) else "unsorted"
        raise UsageError(
            f"{named}: the ids are {what}; give each once, in ascending order. {BOTH}."
        )
    return tuple(layers)
