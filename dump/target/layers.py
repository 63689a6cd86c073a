"""Layer ids: two conventions, their checks and the default choice. Pure, imports nothing heavy.

``--layers`` i = output of decoder layer i, 0-based. ``--target-layer-ids`` j = the state entering layer j (vLLM, speculators), j = i + 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dspark.cache.errors import UsageError

BOTH = "--layers i means the output of decoder layer i (0-based); --target-layer-ids j means the state entering layer j, so j = i + 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What a plan needs to know of a target: H, V, number of decoder layers, longest sequence it takes."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    max_positions: int | None


def parse_ids(text: str, flag: str) -> tuple[int, ...]:
    """``"7,22,38"`` or ``"8 23 39"`` -> ids, not yet checked against a target."""
    words = [w for w in re.split(r"[,\s]+", text.strip()) if w]
    if not words or not all(re.fullmatch(r"-?\d+", w) for w in words):
        raise UsageError(
            f'{flag}: found {text!r}, expected layer numbers such as 7,22,38 or "8 23 39". {BOTH}.'
        )
    return tuple(int(w) for w in words)


def check_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """``layers`` (output convention), if they are in range, sorted and all different."""
    ids = [i + 1 for i in layers]
    named = f"--layers {','.join(map(str, layers))} (= --target-layer-ids {','.join(map(str, ids))})"
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong:
        raise UsageError(
            f"{named}: {wrong[0]} is out of range: the target has {num_layers} layers, so --layers takes 0 to {num_layers - 1} "
            f"and --target-layer-ids 1 to {num_layers}. {BOTH}."
        )
    if list(layers) != sorted(set(layers)):
        what = "duplicated" if len(set(layers)) < len(layers) else "unsorted"
        raise UsageError(f"{named}: the ids are {what}; give each once, in ascending order. {BOTH}.")
    return tuple(layers)


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Five layers spread evenly from 1 to n-3 (36 layers: 1, 9, 17, 25, 33); fewer where the target has too few."""
    if num_layers <= 2:
        return (0,)
    first, last = 1, max(num_layers - 3, 1)
    count = min(5, last - first + 1)
    if count == 1:
        return (first,)
    return tuple(round(first + k * (last - first) / (count - 1)) for k in range(count))
