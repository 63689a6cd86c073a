"""What an engine reports for one prompt, and totals of many: the same numbers from transformers and vLLM.

Counting follows vLLM (`vllm:spec_decode_*`), so that figures compare: a *draft* is one verified block; the
first token of an answer comes from the prefill and belongs to no block; the last block counts whole, also
where the answer stops inside it. `accept_rate[k]` = blocks with more than k tokens accepted / blocks, so it
falls with k; `mean_accepted_length` = 1 + accepted / blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer. ``tokens``: new token ids, at most the limit, the stop token included. ``seconds``: prefill
    and decoding.

    ``drafts``: verified blocks. ``accepted_at[k]``: how many of them had more than ``k`` draft tokens
    accepted (empty without a draft).
    """

    tokens: list[int]
    seconds: float
    drafts: int = 0
    accepted_at: tuple[int, ...] = ()


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Totals of ``outcomes``: prompts, tokens, drafts, mean_accepted_length, accept_rate, tokens_per_second.

    The rates are null where nothing was drafted (every answer ended with its first token).
    """
    drafts = sum(o.drafts for o in outcomes)
    slots = max((len(o.accepted_at) for o in outcomes), default=0)
    accepted_at = [sum(o.accepted_at[k] for o in outcomes if k < len(o.accepted_at)) for k in range(slots)]
    tokens = sum(len(o.tokens) for o in outcomes)
    return {
        "prompts": len(outcomes),
        "tokens": tokens,
        "drafts": drafts,
        "mean_accepted_length": 1 + sum(accepted_at) / drafts if drafts else None,
        "accept_rate": [n / drafts for n in accepted_at] if drafts else None,
        "tokens_per_second": rate(outcomes),
    }


def rate(outcomes: Sequence[Outcome]) -> float:
    """Generated tokens per second over ``outcomes``, one prompt at a time."""
    return sum(len(o.tokens) for o in outcomes) / sum(o.seconds for o in outcomes)
