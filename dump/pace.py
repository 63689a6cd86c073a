"""How fast a dump goes, and how that is known: measured (``measure.py``), or stated with its
source.
"""

from __future__ import annotations

from dataclasses import dataclass

from dspark.cache.shared.command import duration
from dspark.cache.shared.host_cores import cores

# Tokens per second of the plan of a dump on GPUs: a large MoE target on a node of 8 GPUs.
PLAN_RATE = 20000.0
# SmolLM2 (135 M parameters) through transformers in float32, one core of two with AVX-512:
# docs/log/2026-11-26-plans.md.
CPU_CORE_RATE, CPU_WEIGHTS = 300.0, 269e6
CPU_MOST = 5000.0  # per core, however small the target: Python and compression take their time
# Generated tokens per second over those of a prefill.
ANSWER_SHARE = {"cuda": 1 / 10, "cpu": 1 / 25}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """``tokens``: tokens per second of a prefill, None where nobody knows; ``answers``: generated
    tokens per second; ``before``: seconds until the first part is begun, 0 where not measured;
    ``why``: where the rates come from.
    """

    tokens: float | None
    answers: float | None = None
    before: float = 0.0
    why: str

    def seconds(self, tokens: int, answers: int = 0, calibration: int = 0) -> float | None:
        """Seconds for ``tokens``, of which ``answers`` are generated, behind ``calibration``
        tokens where no ``before`` was measured. None where the rate is not known.
        """
        if not self.tokens:
            return None
        before = self.before or calibration / self.tokens
        generated = answers / (self.answers or self.tokens)
        return before + (tokens - answers) / self.tokens + generated

    def words(self, answers: bool) -> str:
        """The rates and their source, for a person."""
        if not self.tokens:
            return self.why
        rate = f"{self.tokens:,.0f} tokens per second"
        if answers and self.answers == self.tokens:
            rate += ", prompts and answers together"
        elif answers and self.answers:
            rate = f"{rate} read and {self.answers:,.0f} generated"
        before = f", after {duration(self.before)} before the first part" if self.before else ""
        return f"at {rate}{before} ({self.why})"


def stated(device: str, weights: int | None) -> Pace:
    """The pace of a plan that nothing was measured for. ``weights``: bytes of the target's, in 16
    bits.
    """
    if device != "cpu":
        why = "assumed, for a large MoE target on 8 GPUs; --measure times yours"
        return Pace(tokens=PLAN_RATE, answers=PLAN_RATE * ANSWER_SHARE["cuda"], why=why)
    if not weights:
        return Pace(tokens=None, why="rate unknown; --measure times it")
    rate = min(CPU_CORE_RATE * CPU_WEIGHTS / weights, CPU_MOST) * cores()
    why = f"scaled from SmolLM2's {CPU_CORE_RATE:.0f} per core; --measure times yours"
    return Pace(tokens=rate, answers=rate * ANSWER_SHARE["cpu"], why=why)
