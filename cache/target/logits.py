"""What a target does to its head's output before the softmax: a factor, a soft cap. Read from its
config; the self-check notices anything missing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FACTORS = ("logit_scale",)  # Cohere
DIVISORS = ("logits_scaling",)  # Granite
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma 2 to 4


@dataclass(frozen=True, slots=True)
class Logits:
    """``scale * head(state)``, then ``cap * tanh(x / cap)``."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Logits:
        """Read a target's config.json, or its ``text_config``."""
        config = config.get("text_config") or config
        scale = 1.0
        for names, power in ((FACTORS, 1), (DIVISORS, -1)):
            for name in names:
                if config.get(name) is not None:
                    scale *= float(config[name]) ** power
        caps = [float(config[name]) for name in CAPS if config.get(name)]
        return cls(scale, caps[0] if caps else None)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Turn the head's output ``x[..., V]`` into the target's logits."""
        x = x if self.scale == 1.0 else x * self.scale
        return x if self.cap is None else self.cap * (x / self.cap).tanh()

    def __str__(self) -> str:
        cap = None if self.cap is None else f"soft-caps its logits at {self.cap:g}"
        scale = None if self.scale == 1.0 else f"multiplies its logits by {self.scale:g}"
        return " and ".join(x for x in (scale, cap) if x) or "leaves its logits as they are"


PLAIN = Logits()
