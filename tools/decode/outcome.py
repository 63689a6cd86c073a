"""What an engine reports for one prompt, and totals over many: the same numbers from transformers
and vLLM.

Counting follows vLLM (`vllm:spec_decode_*`), so that figures are comparable: a *draft* is one
verified block; the first token of an answer comes from the prefill and belongs to no block; the
last block counts completely, even if the answer stops inside it. `accept_rate[k]` = blocks with
more than k tokens accepted / blocks, so it falls with k; `mean_accepted_length` = 1 + accepted /
blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer. ``tokens``: new token ids, at most the limit, including the stop token.
    ``seconds``: prefill and decoding.

    ``drafts``: verified blocks. ``accepted_at[k]``: how many of them had more than ``k`` draft
    tokens accepted (empty without a draft). ``drafted``: (position of the anchor, drafted tokens)
    of each block, if requested; vLLM adds one that it never verified. ``steps`` of a pipeline of
    ``stages``; 0 without one.
    """

    tokens: list[int]
    seconds: float
    drafts: int = 0
    accepted_at: tuple[int, ...] = ()
    drafted: tuple[tuple[int, tuple[int, ...]], ...] = ()
    steps: int = 0
    stages: int = 0

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Restore from ``dataclasses.asdict`` via JSON, which has no tuples."""
        drafted = tuple((position, tuple(tokens)) for position, tokens in row["drafted"])
        return cls(**{**row, "accepted_at": tuple(row["accepted_at"]), "drafted": drafted})


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Totals of ``outcomes``: prompts, tokens, drafts, mean_accepted_length and its standard error,
    accept_rate, tokens_per_second.

    The rates are null if nothing was drafted (every answer ended with its first token), the error
    if fewer than two prompts drafted anything.
    """
    drafts = sum(o.drafts for o in outcomes)
    slots = max((len(o.accepted_at) for o in outcomes), default=0)
    accepted_at = [
        sum(o.accepted_at[k] for o in outcomes if k < len(o.accepted_at)) for k in range(slots)
    ]
    tokens = sum(len(o.tokens) for o in outcomes)
    return {
        "prompts": len(outcomes),
        "tokens": tokens,
        "drafts": drafts,
        "mean_accepted_length": 1 + sum(accepted_at) / drafts if drafts else None,
        "mean_accepted_length_se": ratio_error(
            [sum(o.accepted_at) for o in outcomes], [o.drafts for o in outcomes]
        ),
        "accept_rate": [n / drafts for n in accepted_at] if drafts else None,
        "tokens_per_second": rate(outcomes),
    }


def ratio_error(tops: Sequence[float], bottoms: Sequence[float]) -> float | None:
    """Return the standard error of ``sum(tops) / sum(bottoms)`` over prompts as clusters
    (linearised ratio estimator).

    Blocks of one answer resemble each other, so blocks counted as independent would claim too small
    an error.
    """
    used = [(t, b) for t, b in zip(tops, bottoms, strict=True) if b]
    if len(used) < 2:
        return None
    total = sum(b for _, b in used)
    ratio = sum(t for t, _ in used) / total
    spread = sum((t - ratio * b) ** 2 for t, b in used)
    return float((spread * len(used) / (len(used) - 1)) ** 0.5 / total)


def rate(outcomes: Sequence[Outcome]) -> float:
    """Return the generated tokens per second over ``outcomes``, one prompt at a time."""
    return sum(len(o.tokens) for o in outcomes) / sum(o.seconds for o in outcomes)
