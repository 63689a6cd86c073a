"""Speculative decoding on transformers: the reference for serving, and the default engine of
``eval``. It decodes one sequence at a time, in plain Python around two forward passes per block, so
its speed says little about a server's, but its accepted lengths are a server's. Lossless: greedily
the output is the target's own greedy output (up to rounding: a block of B+1 rows and a single row
are different matrix products, and in bf16 near-ties can fall differently), with a temperature it is
distributed as the target's samples.

Legend: P prompt tokens, B draft tokens of a block, V vocabulary, a position of a block's anchor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.tools.decode.outcome import Outcome
from dspark.tools.decode.rejection import sample, verify_greedy, verify_sampled
from dspark.tools.decode.target import DecodingTarget
from dspark.train.draft.decoding import Drafted
from dspark.train.draft.model import DraftModel
from dspark.train.draft.types import drafter


@dataclass(frozen=True, slots=True)
class VerifiedBlock:
    """A verified block: position of its anchor, the token drafted in each slot, how many of them
    were kept.
    """

    anchor: int
    drafted: tuple[int, ...]
    accepted: int


@dataclass(frozen=True, slots=True)
class Generation:
    """``tokens``: the new tokens, cut at the limit and after a stop token. ``blocks`` are counted
    completely, as in vLLM.
    """

    tokens: list[int]
    blocks: list[VerifiedBlock]
    seconds: float

    def outcome(self, block_size: int) -> Outcome:
        """Return the counts, as every engine reports them."""
        at = tuple(sum(b.accepted > k for b in self.blocks) for k in range(block_size))
        return Outcome(
            tokens=self.tokens, seconds=self.seconds, drafts=len(self.blocks), accepted_at=at,
            drafted=tuple((b.anchor, b.drafted) for b in self.blocks),
        )  # fmt: skip


def speculative_generate(
    target: DecodingTarget,
    draft: DraftModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    stop_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Generation:
    """Continue ``prompt`` (P >= 1 ids) by at most ``max_tokens``. ``target`` is entered and taps
    the draft's layers.

    ``generator`` lives on the draft's device (the target's logits are moved there); it is used only
    if ``temperature`` > 0.
    """
    assert target.layer_ids == draft.config.target_layer_ids, (
        "the target's taps are not the draft's aux layers"
    )
    device = draft.device
    start = time.perf_counter()
    target.start()
    decoder = drafter(draft.config.speculator_type).decoder(draft)
    logits, aux = target.step(prompt, last_only=True)
    new = [_first(logits[-1].to(device), temperature, generator)]
    out, blocks, seen = list(new), list[VerifiedBlock](), list(prompt)
    while len(out) < max_tokens and not set(stop_ids).intersection(new):
        decoder.extend(aux, torch.tensor(seen, device=device))
        anchor = decoder.length
        drafted = decoder.draft(out[-1], temperature=temperature, generator=generator)
        tokens = [int(t) for t in drafted.tokens]
        logits, aux = target.step([out[-1], *tokens])
        accepted, following = _verify(drafted, logits.to(device), temperature, generator)
        blocks.append(VerifiedBlock(anchor, tuple(tokens), accepted))
        # what the next context adds: all but the token that follows
        seen = [out[-1], *tokens[:accepted]]
        new = [*tokens[:accepted], following]
        out += new
        aux = aux[: accepted + 1]
        target.crop(anchor + accepted + 1)
    return Generation(_cut(out, max_tokens, stop_ids), blocks, time.perf_counter() - start)


def outcome_of(
    target: DecodingTarget, draft: DraftModel, prompt: Sequence[int], **how: Any
) -> Outcome:
    """Generate one answer with a draft of any type, and return its counts; ``how`` as for
    ``speculative_generate``.
    """
    if drafter(draft.config.speculator_type).stages(draft.config):
        from dspark.tools.decode.pipeline import pipelined_generate

        return pipelined_generate(target, draft, prompt, **how).outcome()
    return speculative_generate(target, draft, prompt, **how).outcome(draft.config.block_size)


def _first(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature > 0:
        return sample(torch.softmax(logits / temperature, dim=-1), generator)
    return int(logits.argmax())


def _verify(
    drafted: Drafted, logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[int, int]:
    if drafted.probs is None:
        return verify_greedy(drafted.tokens, logits)
    return verify_sampled(
        drafted.tokens, drafted.probs, torch.softmax(logits / temperature, dim=-1), generator
    )


def _cut(tokens: list[int], limit: int, stop_ids: Sequence[int]) -> list[int]:
    """Cut to ``limit`` tokens, ending with the first stop token."""
    stop = set(stop_ids)
    ends = [i + 1 for i, token in enumerate(tokens) if token in stop]
    return tokens[: min([limit, *ends[:1]])]
