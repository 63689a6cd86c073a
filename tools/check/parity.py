"""Run our decoder and real vLLM on the same prompts, greedily, and compare every block that both
drafted, token for token.

Blocks are matched by the position of their anchor. Both outputs must be the target's own, so the
text before a position is the same in both, and what either drafted there can be compared even if
the two took different steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dspark.tools.decode.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Parity:
    """Counts over all prompts. ``only_ours`` / ``only_served``: blocks that one side drafted at a
    position where the other did not.
    ``different``: the first few blocks that are not equal.
    """

    compared: int
    equal: int
    only_ours: int
    only_served: int
    same_output: bool
    different: list[dict[str, Any]]

    @property
    def holds(self) -> bool:
        """Tell whether answers, steps and the tokens of every block are the same, and some were
        compared.
        """
        return (
            self.same_output
            and 0 < self.compared == self.equal
            and not self.only_ours
            and not self.only_served
        )

    def to_json(self) -> dict[str, Any]:
        return {"holds": self.holds, **asdict(self)}


def parity_of(ours: Sequence[Outcome], served: Sequence[Outcome], show: int = 3) -> Parity:
    """Compare one outcome per prompt from each side, with ``drafted`` filled in."""
    compared = equal = only_ours = only_served = 0
    different: list[dict[str, Any]] = []
    for number, (a, b) in enumerate(zip(ours, served, strict=True)):
        mine, theirs = dict(a.drafted), dict(b.drafted[: b.drafts])
        both = sorted(mine.keys() & theirs.keys())
        compared += len(both)
        only_ours += len(mine) - len(both)
        only_served += len(theirs) - len(both)
        for position in both:
            if mine[position] == theirs[position]:
                equal += 1
            elif len(different) < show:
                different.append(
                    {
                        "prompt": number,
                        "anchor": position,
                        "ours": list(mine[position]),
                        "served": list(theirs[position]),
                    }
                )
    same = all(a.tokens == b.tokens for a, b in zip(ours, served, strict=True))
    return Parity(compared, equal, only_ours, only_served, same, different)


def serve_and_compare(
    model: Any,
    target: str,
    draft: str,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    dtype: str = "float32",
) -> Parity:
    """``parity_of`` what ``ours_and_served`` gives."""
    both = ours_and_served(
        model, target, draft, prompts, max_tokens=max_tokens, stop_ids=stop_ids, dtype=dtype
    )
    return parity_of(*both)


def ours_and_served(
    model: Any,
    target: str,
    draft: str,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    dtype: str = "float32",
) -> tuple[list[Outcome], list[Outcome]]:
    """Decode ``prompts`` with our decoder on the loaded ``model`` and with a vLLM started on the
    folders ``target`` and ``draft``: an outcome per prompt from each.
    """
    from dspark.tools.decode.decode import speculative_generate
    from dspark.tools.decode.target import DecodingTarget
    from dspark.tools.decode.vllm_serve import ServeRequest, run_vllm
    from dspark.train.draft.saved.folder import load_config, load_draft
    from dspark.train.draft.types import drafter

    config = load_config(draft)
    size = config.block_size
    with DecodingTarget(model, config.target_layer_ids) as tapped:
        ready = load_draft(draft, tapped.frozen, dtype=model.dtype).to(model.device).eval()
        ours = [
            speculative_generate(
                tapped, ready, list(p), max_tokens=max_tokens, stop_ids=stop_ids
            ).outcome(size)
            for p in prompts
        ]
    request = ServeRequest(
        target=target,
        draft=draft,
        num_speculative_tokens=size,
        prompts=[list(p) for p in prompts],
        max_tokens=max_tokens,
        stop_token_ids=tuple(stop_ids),
        dtype=dtype,
        speculation=drafter(config.speculator_type).serving(config),
        trace=True,
    )
    return ours, run_vllm(request)
