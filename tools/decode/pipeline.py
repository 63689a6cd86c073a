"""Decode beside an emulated pipeline: a target of n stages with up to n tokens of one sequence in
flight, emulated step by step.

A stage's output depends on the token and those before it, not on when it runs. So each token gets
one whole pass when it enters, and its states and logits are withheld until its age, in steps, makes
them available. Drafts after a wrong token are discarded, as in a real pipeline. Lossless like
``decode.py``: every accepted token was judged by the target's own logits.

Legend: n stages, T taps, H hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark.tools.decode.outcome import Outcome
from dspark.tools.decode.rejection import sample, verify_greedy, verify_sampled
from dspark.tools.decode.target import DecodingTarget
from dspark.train.draft.decoding import Drafted
from dspark.train.draft.model import DraftModel
from dspark.train.draft.spd.decoding import SpdDecoder
from dspark.train.draft.types import drafter


@dataclass(slots=True)
class Flying:
    """A token in flight: its states [T, H] and logits [V] exist from the start but may be read only
    once it is old enough.
    """

    token: int
    drafted: Drafted | None
    aux: Tensor
    logits: Tensor
    age: int = 0


@dataclass(slots=True)
class Piped:
    """An answer: new ``tokens``, ``steps`` of the pipeline, and whether each judged draft was
    accepted.
    """

    tokens: list[int]
    stages: int
    steps: int = 0
    judged: list[bool] = field(default_factory=list)
    drafted: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    seconds: float = 0.0

    def outcome(self) -> Outcome:
        """The counts, as every engine reports them; a judged draft is a block of one token."""
        return Outcome(
            tokens=self.tokens,
            seconds=self.seconds,
            drafts=len(self.judged),
            accepted_at=(sum(self.judged),),
            drafted=tuple(self.drafted),
            steps=self.steps,
            stages=self.stages,
        )


def pipelined_generate(
    target: DecodingTarget,
    draft: DraftModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    stop_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Piped:
    """As ``decode.speculative_generate``, with a head that runs beside the pipeline."""
    start, stop = time.perf_counter(), set(stop_ids)
    device = draft.device
    n = drafter(draft.config.speculator_type).stages(draft.config)
    decoder = drafter(draft.config.speculator_type).decoder(draft)
    assert isinstance(decoder, SpdDecoder)
    target.start()
    logits, aux = target.step(prompt, last_only=True)
    decoder.extend(aux, torch.tensor(list(prompt), device=device))

    def enter(token: int, drafted: Drafted | None) -> Flying:
        logits, aux = target.step([token])
        return Flying(token, drafted, aux[0], logits[0].to(device))

    first = logits[-1].to(device)
    if temperature > 0:
        out = Piped([sample(torch.softmax(first / temperature, -1), generator)], n)
    else:
        out = Piped([int(first.argmax())], n)
    flight = list[Flying]()
    while len(out.tokens) < max_tokens and out.tokens[-1] not in stop:
        flight = flight or [enter(out.tokens[-1], None)]
        out.steps += 1
        drafted = decoder.behind(
            [f.token for f in flight],
            torch.stack([f.aux for f in flight]),
            temperature=temperature,
            generator=generator,
        )
        for f in flight:
            f.age += 1
        oldest = flight[0]
        if oldest.age == n:
            following = flight[1]
            assert following.drafted is not None
            stands, token = _judge(following.drafted, oldest.logits, temperature, generator)
            out.judged.append(stands)
            out.drafted.append((decoder.length, (following.token,)))
            out.tokens.append(token)
            decoder.extend(oldest.aux[None], torch.tensor([oldest.token], device=device))
            flight.pop(0)
            if not stands:
                target.crop(decoder.length)
                flight = []
                continue
        flight.append(enter(int(drafted.tokens[0]), drafted))
    out.seconds = time.perf_counter() - start
    return out


def _judge(
    drafted: Drafted, logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[bool, int]:
    """Tell whether the drafted token is accepted by the target's ``logits`` [V], and return the
    token at that place.
    """
    both = logits[None].expand(2, -1)  # the row after an accepted one belongs to a later step
    if drafted.probs is None:
        accepted, following = verify_greedy(drafted.tokens, both)
    else:
        accepted, following = verify_sampled(
            drafted.tokens, drafted.probs, torch.softmax(both / temperature, -1), generator
        )
    return bool(accepted), int(drafted.tokens[0]) if accepted else following
