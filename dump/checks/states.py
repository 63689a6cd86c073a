"""Check, before anything is written, that the states agree with the target. On a few samples,
``lm_head(last[p])`` is compared with the engine's own prediction after position p: the greedy
token, and its log-probability (a missing norm can keep the order of the logits and still change
every probability). Below ``THRESHOLD`` the dump stops, and the message names the known fault whose
correction makes the states agree.

The other layers are compared with one another (``likeness.py``) to find a wrong order or position.
Neither sees a rank's partial sum in a layer in between, so the vLLM engine compares its ranks
(``spool.py``).

Near ties count as agreement: the engine's token is not ours, but our logits for the two differ by
less than the dtype can resolve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspark.cache.codec.state_errors import check_finite, naming
from dspark.cache.errors import EngineError
from dspark.cache.records import TokenSample, last_rows
from dspark.cache.target.frozen import FrozenTarget
from dspark.cache.target.logits import PLAIN, Logits
from dspark.dump.checks.likeness import findings

if TYPE_CHECKING:
    import torch

    from dspark.dump.engines.engine import Engine, Prediction, States

THRESHOLD = 0.99
PROBE_SAMPLES = 4
PROBE_TOKENS = 4096
# Largest difference in log-probability that rounding explains: logits of magnitude 30 step by 1/8
# in bfloat16, twice rounded.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.5, "float16": 0.1}
NOTHING_WRITTEN = (
    "Nothing was written. Try --engine transformers, or another version of the engine."
)
ROWS = 256  # positions per chunk, which bounds memory to [ROWS, V] float32


@dataclass(frozen=True, slots=True)
class HeadOf:
    """The frozen head, and what the target does to its output."""

    frozen: FrozenTarget
    logits: Logits


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement over ``positions``: share where token and value agree, share of equal tokens
    (including near ties), largest and mean difference of log-probabilities.
    """

    positions: int
    agree: float
    top1: float
    worst: float
    mean: float
    examples: tuple[str, ...]


def probe_samples(samples: Sequence[TokenSample]) -> list[TokenSample]:
    """Return the first samples, cut so that the check stays cheap: at most PROBE_SAMPLES,
    PROBE_TOKENS in all (the first is taken whole).
    """
    out: list[TokenSample] = []
    for sample in samples[:PROBE_SAMPLES]:
        if out and sum(len(s.input_ids) for s in [*out, sample]) > PROBE_TOKENS:
            break
        out.append(sample)
    return out


def check(
    engine: Engine,
    samples: Sequence[TokenSample],
    frozen: FrozenTarget,
    dtype: str,
    layers: Sequence[int] = (),
    logits: Logits = PLAIN,
    source: str = "the corpus",
) -> tuple[Agreement, dict[int, States]]:
    """Run the check; raises EngineError below THRESHOLD. Also returns the states, so that they need
    not be computed twice.

    ``layers``: ids of the aux layers; they and ``source`` are for messages. ``logits``: what the
    target does to its head's output.
    """
    states = dict(engine.capture(samples))
    for i, sample in enumerate(samples) if layers else ():
        with naming([sample], layers, source):
            check_finite(*states[i])
    predictions = engine.predict(samples)
    positions = [last_rows(s.loss_mask).nonzero()[0].tolist() for s in samples]
    lasts = [states[i].last for i in range(len(samples))]
    head = HeadOf(frozen, logits)
    found = agreement(lasts, positions, predictions, head, dtype)
    if found.agree < THRESHOLD:
        causes = _causes(lasts, positions, predictions, head, dtype)
        raise EngineError(_message(engine.name, found, causes))
    wrong = findings([states[i] for i in range(len(samples))], positions, layers) if layers else []
    if wrong:
        raise EngineError(
            "\n".join(
                [f"self-check of the {engine.name} engine failed: {w}." for w in wrong]
                + [NOTHING_WRITTEN]
            )
        )
    return found, states


def agreement(
    lasts: Sequence[torch.Tensor],
    positions: Sequence[Sequence[int]],
    predictions: Sequence[Prediction],
    target: HeadOf | FrozenTarget,
    dtype: str,
) -> Agreement:
    """``lasts[i]`` [M_i, H] are the states at ``positions[i]`` of sample i."""
    import torch

    tolerance = TOLERANCE[dtype]
    target = target if isinstance(target, HeadOf) else HeadOf(target, PLAIN)
    head = target.frozen.lm_head.to(lasts[0].device).float()
    total = same = good = 0
    diffs: list[float] = []
    examples: list[str] = []
    for i, (last, where) in enumerate(zip(lasts, positions, strict=True)):
        for begin in range(0, len(where), ROWS):
            rows = list(where[begin : begin + ROWS])
            logits = target.logits.of(last[begin : begin + ROWS].detach().float() @ head.T)
            theirs = torch.tensor([predictions[i].ids[p] for p in rows], device=logits.device)
            value = torch.tensor([predictions[i].logprobs[p] for p in rows], device=logits.device)
            best = logits.max(-1)
            of_theirs = logits.gather(1, theirs[:, None])[:, 0]
            token = (best.indices == theirs) | (best.values - of_theirs <= tolerance)
            ours = of_theirs - logits.logsumexp(-1)
            diff = (ours - value).abs()
            ok = token & (diff <= tolerance)
            total, same, good = total + len(rows), same + int(token.sum()), good + int(ok.sum())
            diffs += diff.tolist()
            for row in (~ok).nonzero()[:, 0].tolist()[: 3 - len(examples)]:
                examples.append(
                    f"sample {i} position {rows[row]}: the states predict token "
                    f"{int(best.indices[row])}, the engine says {int(theirs[row])} with "
                    f"log-probability {float(value[row]):.3f} (from the states "
                    f"{float(ours[row]):.3f})"
                )
    if total == 0:
        raise EngineError(
            "self-check: no stored position in the first samples; each needs two consecutive "
            "supervised tokens."
        )
    return Agreement(
        total, good / total, same / total, max(diffs), sum(diffs) / total, tuple(examples)
    )


def _causes(
    lasts: Sequence[torch.Tensor],
    positions: Sequence[Sequence[int]],
    predictions: Sequence[Prediction],
    target: HeadOf,
    dtype: str,
) -> list[str]:
    """Undo each known fault; those that make the states agree are the likely causes."""
    import torch

    out = []
    weight = target.frozen.norm.float()
    for factor in (weight, 1 + weight):  # Gemma's norms multiply by one more than their weight
        normed = [
            x.float()
            * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
            * factor.to(x.device)
            for x in lasts
        ]
        if agreement(normed, positions, predictions, target, dtype).top1 >= THRESHOLD:
            out.append("the final norm was not applied: with it, the states agree")
            break
    for shift, what in ((1, "later"), (-1, "earlier")):
        moved = [[p + shift for p in where] for where in positions]
        kept = [
            [k for k, p in enumerate(where) if 0 <= p < len(prediction.ids)]
            for where, prediction in zip(moved, predictions, strict=True)
        ]
        rows = [
            x[torch.tensor(k, dtype=torch.long, device=x.device)]
            for x, k in zip(lasts, kept, strict=True)
        ]
        where = [[w[k] for k in ks] for w, ks in zip(moved, kept, strict=True)]
        if any(where) and agreement(rows, where, predictions, target, dtype).top1 >= THRESHOLD:
            out.append(f"the positions are shifted by one: the states belong one position {what}")
    return out


def _message(engine: str, found: Agreement, causes: Sequence[str]) -> str:
    likely = causes or [
        "no single known fault explains it: a layer other than the last was captured, "
        "the states are one tensor-parallel rank's partial sum, the weights differ, or "
        "the target changes its logits in a way that its config does not declare"
    ]
    lines = [
        f"self-check of the {engine} engine failed: states and engine agree at {found.agree:.1%} "
        f"of {found.positions} positions "
        f"(greedy token {found.top1:.1%}, mean log-probability difference {found.mean:.3g}, "
        f"largest {found.worst:.3g}), expected at least {THRESHOLD:.0%}.",
        *(f"  {example}" for example in found.examples),
        *(f"Likely cause: {cause}." for cause in likely),
        NOTHING_WRITTEN,
    ]
    return "\n".join(lines)
