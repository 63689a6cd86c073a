"""Calibration of the confidence head: pure functions on recorded blocks. Sequential temperature
scaling (DSpark paper, section 3.2.1).

Legend: N blocks with all their slots, B slots. ``logit[N, B]`` is the head's, ``accept[N, B]`` what
it estimates: the probability ``1 - TV`` that slot k is accepted if all before it are. ``survival``
of k is the product up to k: that the block is accepted beyond slot k. A scheduler cuts a block by
that product, so it is what gets calibrated: left to right, T_k is the grid's value that makes the
ECE of

    s_k = prod_{j<=k} sigmoid(logit_j / T_j + b_j)

smallest with the T_j before it fixed. The paper has b = 0; ``shift`` also searches b, for a head
that is wrong on average where its logit is near 0, which no temperature can fix. Labels are
probabilities, not draws: a block counts as s parts accepted and 1 - s rejected, which measures the
same thing as sampled outcomes with less noise (ECE and AUROC as in
``dspark.train.objective.metrics``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.train.objective.metrics import BINS as FINE
from dspark.train.objective.metrics import auroc, expected_calibration_error

TEMPERATURES = torch.logspace(-1, 1, 81, base=4.0, dtype=torch.float64)  # 0.25 to 4
SHIFTS = torch.linspace(-2, 2, 41, dtype=torch.float64)
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Few: a few thousand blocks in 100 bins measure their own noise (0.046 where 10 bins say 0.025),
# and temperatures are fitted to it.
BINS = 10


@dataclass(frozen=True, slots=True)
class Scaling:
    """``sigmoid(logit / temperature + shift)``, both fp64 [B]. Length 1 means one for all slots."""

    temperature: Tensor
    shift: Tensor

    def __call__(self, logit: Tensor) -> Tensor:
        return torch.sigmoid(logit.double() / self.temperature + self.shift)

    def to_json(self) -> dict[str, list[float]]:
        return {"temperature": self.temperature.tolist(), "shift": self.shift.tolist()}


def identity(size: int) -> Scaling:
    """Confidence as the head states it."""
    return Scaling(torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))


def binned(guess: Tensor, truth: Tensor, count: int = BINS) -> Tensor:
    """Return a histogram [3, count] of ``guess[N]``: number, sum of guesses, sum of ``truth[N]`` in
    each equal bin.
    """
    at = (guess * count).long().clamp(max=count - 1)
    values = torch.stack([torch.ones_like(guess), guess, truth.double()])
    return torch.zeros(3, count, dtype=torch.float64).index_add(1, at, values)


def ece(guess: Tensor, truth: Tensor) -> float:
    """Return the expected calibration error of ``guess[N]`` against probabilities ``truth[N]``."""
    out = expected_calibration_error(binned(guess, truth))
    assert out is not None, "no blocks"
    return out


def brier(guess: Tensor, truth: Tensor) -> float:
    """Return the expected squared error against an outcome drawn with probability ``truth``."""
    return float((truth * (1 - guess) ** 2 + (1 - truth) * guess**2).mean())


def fit(logit: Tensor, accept: Tensor, *, shift: bool = False) -> Scaling:
    """Fit sequential temperature scaling to [N, B] records."""
    truth = accept.double().cumprod(1)
    before = torch.ones(logit.shape[0], dtype=torch.float64)
    chosen: list[tuple[float, float]] = []
    for k in range(logit.shape[1]):
        chosen.append(_best([logit[:, k]], [before], [truth[:, k]], shift))
        before = before * torch.sigmoid(logit[:, k].double() / chosen[k][0] + chosen[k][1])
    table = torch.tensor(chosen, dtype=torch.float64)
    return Scaling(table[:, 0], table[:, 1])


def fit_shared(logit: Tensor, accept: Tensor, *, shift: bool = False) -> Scaling:
    """Fit one temperature (and shift) for all slots, which can be folded into the one linear map
    that servers read. Smallest mean ECE of the slots' own confidences, which unlike survival do not
    depend on one another.
    """
    columns = range(logit.shape[1])
    ones = torch.ones(logit.shape[0], dtype=torch.float64)
    best = _best(
        [logit[:, k] for k in columns],
        [ones for _ in columns],
        [accept[:, k].double() for k in columns],
        shift,
    )
    return Scaling(*(torch.tensor([v], dtype=torch.float64) for v in best))


def _best(
    logits: list[Tensor], before: list[Tensor], truth: list[Tensor], shift: bool
) -> tuple[float, float]:
    """Return the (T, b) of the grid with the smallest sum of ECEs; among equals, the one nearest to
    the identity.
    """
    shifts = SHIFTS.tolist() if shift else [0.0]
    grid = sorted(
        ((t, b) for t in TEMPERATURES.tolist() for b in shifts),
        key=lambda p: abs(torch.tensor(p[0]).log().item()) + abs(p[1]),
    )
    pairs = list(zip(logits, before, truth, strict=True))
    return min(
        grid,
        key=lambda p: sum(ece(b * torch.sigmoid(x.double() / p[0] + p[1]), y) for x, b, y in pairs),
    )


def measure(scaling: Scaling, logit: Tensor, accept: Tensor) -> dict[str, Any]:
    """Measure, by slot, the survival (used for scheduling) and the slot's own confidence: ece,
    brier, auroc, means, reliability diagram.
    """
    own = scaling(logit)
    return {
        "survival": _by_slot(own.cumprod(1), accept.double().cumprod(1)),
        "slot": _by_slot(own, accept.double()),
    }


def _by_slot(guess: Tensor, truth: Tensor) -> dict[str, Any]:
    columns = [(guess[:, k], truth[:, k]) for k in range(guess.shape[1])]
    return {
        "ece": [ece(g, t) for g, t in columns],
        "brier": [brier(g, t) for g, t in columns],
        "auroc": [auroc(binned(g, t, FINE)) for g, t in columns],
        "confidence": [float(g.mean()) for g, _ in columns],
        "accepted": [float(t.mean()) for _, t in columns],
        "diagram": [_diagram(binned(g, t)) for g, t in columns],
    }


def _diagram(bins: Tensor) -> list[dict[str, float]]:
    """Return the non-empty bins: share of blocks, mean confidence, mean acceptance."""
    total = float(bins[0].sum())
    return [
        {"share": n / total, "confidence": g / n, "accepted": t / n}
        for n, g, t in bins.T.tolist()
        if n > 0
    ]


KEPT = 0.95  # of the tokens that a draft gains, at the recommended threshold


def recommended(points: list[dict[str, float]]) -> float:
    """Return the largest threshold of a ``sweep`` that keeps ``KEPT`` of the tokens gained, and so
    verifies the fewest drafts.
    """
    most = max(p["tokens"] - 1 for p in points)
    return max(p["threshold"] for p in points if p["tokens"] - 1 >= KEPT * most)


def sweep(scaling: Scaling, logit: Tensor, accept: Tensor) -> list[dict[str, float]]:
    """Cut blocks before the first slot whose survival falls below a threshold: returns drafts
    verified per step, tokens gained per step (including the target's own), and the share of the
    verified drafts that are accepted.
    """
    survival, truth = scaling(logit).cumprod(1), accept.double().cumprod(1)
    out = []
    for threshold in THRESHOLDS:
        kept = survival >= threshold  # survival falls along a block, so this is a prefix
        verified, gained = float(kept.sum(1).double().mean()), float((truth * kept).sum(1).mean())
        out.append(
            {
                "threshold": threshold,
                "verified": verified,
                "tokens": 1 + gained,
                "accepted_share": gained / verified if verified else 0.0,
            }
        )
    return out
