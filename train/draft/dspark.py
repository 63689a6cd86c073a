"""DSpark: blocks with a Markov head, which makes a slot depend on the token before it, and a
confidence head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.cache.errors import DraftError, UsageError
from dspark.train.draft.config import MARKOV_TYPES, DraftConfig
from dspark.train.draft.types import DrafterType


class DSpark(DrafterType):
    name = "dspark"
    summary = "parallel backbone, Markov and confidence heads"

    def check(self, config: DraftConfig) -> None:
        if config.markov_rank <= 0:
            raise UsageError(f"markov_rank is {config.markov_rank}; expected a positive rank")
        if config.markov_head_type not in MARKOV_TYPES:
            raise UsageError(
                f"markov_head_type is {config.markov_head_type!r}; expected one of "
                f"{', '.join(MARKOV_TYPES)}"
            )

    def recognises(self, flat: Mapping[str, Any]) -> bool:
        return bool(flat.get("markov_rank"))

    def from_flat(self, flat: Mapping[str, Any]) -> DraftConfig:
        return DraftConfig.of_backbone(flat, self.own(flat))

    def own(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Return this type's fields of ``DraftConfig`` from config.json."""
        try:
            rank = int(flat.get("markov_rank", 0))
        except (TypeError, ValueError) as wrong:
            raise DraftError(f"config.json describes no usable draft: {wrong}") from wrong
        return {
            "speculator_type": self.name,
            "markov_rank": rank,
            "markov_head_type": str(flat.get("markov_head_type", "vanilla")),
            "enable_confidence_head": bool(flat.get("enable_confidence_head", False)),
            "confidence_head_with_markov": bool(flat.get("confidence_head_with_markov", False)),
        }

    def to_flat(self, config: DraftConfig) -> dict[str, Any]:
        return config.flat_fields()

    def starts_from(self, other: DrafterType) -> bool:
        return isinstance(other, DSpark)  # one backbone; the heads may be omitted or start fresh

    def servable_by_vllm(self, config: DraftConfig) -> bool:
        return config.markov_head_type == "vanilla"  # vLLM has no other


DSPARK = DSpark()
