"""Compute what drafts beside a pipeline of n stages gain, from tokens and steps; the only source of
these figures for ``eval`` and ``score``.

A step is one stage's time, 1/n of a pass. A token after a fresh one (the prefill's or a correction)
takes n steps, one after an accepted draft a single step. So of N tokens with A accepted drafts
among tokens 1..N-2, ``steps = n (N - 1) - (n - 1) A``; a pipeline without drafts takes n for each
token. Two definitions of acceptance are in use and both are reported: ``acceptance_rate`` is tokens
per step, including the prefill's token; ``draft_acceptance`` is the share of judged drafts that
were accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dspark.tools.decode.outcome import Outcome, ratio_error


def steps_of(stages: int, tokens: int, accepted: int) -> int:
    """Return the steps for ``tokens`` N >= 1, with ``accepted`` = drafts accepted among tokens
    1..N-2.
    """
    return stages * (tokens - 1) - (stages - 1) * accepted


def gains(
    stages: int, answers: Sequence[tuple[int, int]], judged: int, accepted: int
) -> dict[str, Any]:
    """Return the figures for ``answers`` (tokens, steps), and for all drafts in them that were
    ``judged`` and ``accepted``. ``theoretical_gain`` is the mean over answers, weighted by their
    tokens, of ``n tokens / steps - 1``; the pooled gain and the accepted length without the
    prefill's tokens are given too. None if no step was taken.
    """
    moving = [(tokens, steps) for tokens, steps in answers if steps]
    tokens, steps = sum(t for t, _ in answers), sum(s for _, s in answers)
    rate = tokens / steps if steps else None
    weight = sum(t for t, _ in moving)
    mean = sum(t * (stages * t / s - 1) for t, s in moving) / weight if weight else None
    return {
        "stages": stages,
        "steps": steps,
        "acceptance_rate": rate,
        "equivalent_accept_length": None if rate is None else stages * rate,
        "equivalent_accept_length_drafted": stages * (tokens - len(answers)) / steps
        if steps
        else None,
        "equivalent_accept_length_se": ratio_error(
            [stages * t for t, _ in answers], [s for _, s in answers]
        ),
        "theoretical_gain": mean,
        "theoretical_gain_pooled": None if rate is None else stages * rate - 1,
        "draft_acceptance": accepted / judged if judged else None,
        "drafts_judged": judged,
        "drafts_accepted": accepted,
    }


def pipeline_gains(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """``gains`` of decoded answers; empty where no pipeline was run."""
    stages = max((o.stages for o in outcomes), default=0)
    if not stages:
        return {}
    accepted = sum(sum(o.accepted_at) for o in outcomes)
    return gains(
        stages,
        [(len(o.tokens), o.steps) for o in outcomes],
        sum(o.drafts for o in outcomes),
        accepted,
    )
