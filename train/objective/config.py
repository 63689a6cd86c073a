"""The weights of the objective's terms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from dspark.cache import json_text
from dspark.cache.errors import UsageError

EXAMPLE = '{"ce": 0.1, "kl": 0.3, "l1": 0.6}'  # of --loss-fn, in messages


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Weights of the four terms (``l1`` on L1 = 2 TV) and the decay of slot weights (0 = all slots
    have weight 1).
    """

    ce: float = 0.1
    l1: float = 0.6
    confidence: float = 1.0
    decay: float = 4.0
    kl: float = 0.3

    def __post_init__(self) -> None:
        for name in ("ce", "l1", "confidence", "decay", "kl"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise UsageError(
                    f"objective: {name} is {value}; expected a finite number, 0 or more"
                )
        if self.ce + self.l1 + self.kl == 0:
            raise UsageError("objective: ce, l1 and kl are all 0, so the draft would learn nothing")

    @classmethod
    def from_json(cls, text: str, *, confidence: float = 1.0, decay: float = 4.0) -> Self:
        """Parse ``--loss-fn``: a JSON object with keys ``ce``, ``l1`` or ``tv``, ``kl``; a missing
        key has weight 0.
        """
        try:
            given: Any = json_text.loads(text)
        except ValueError as wrong:
            raise UsageError(f"--loss-fn is not JSON ({wrong}); expected e.g. {EXAMPLE}") from wrong
        if not isinstance(given, dict):
            raise UsageError(f"--loss-fn is {text}; expected a JSON object, e.g. {EXAMPLE}")
        unknown = sorted(set(given) - {"ce", "l1", "tv", "kl"})
        if unknown:
            raise UsageError(
                f"--loss-fn has unknown keys {', '.join(unknown)}; known: ce, l1, tv (= l1 / 2), kl"
            )
        if "l1" in given and "tv" in given:
            raise UsageError(
                "--loss-fn has both l1 and tv; they are the same term (l1 = 2 tv), give only one"
            )
        for key, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"--loss-fn: {key} is {value!r}; expected a number")
        distance = given.get("l1", given.get("tv", 0.0) / 2)
        return cls(
            ce=float(given.get("ce", 0.0)),
            l1=float(distance),
            confidence=confidence,
            decay=decay,
            kl=float(given.get("kl", 0.0)),
        )
