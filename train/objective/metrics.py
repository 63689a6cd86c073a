"""Quality metrics of a draft, summed slot by slot so that rows, steps and ranks simply add up.

Legend: B slots of a block, A anchors, N counted slots.

accept_rate at k: mean of ``1 - L1/2`` over the counted slots k. mean_accepted_length (tau): mean
over *full* blocks (all B slots counted) of ``1 + sum_k prod_{j<=k} accept_j``; a block cut short by
the end of its text could never reach B, so it says nothing about the draft (DeepSpec averages over
every block that counts a slot, with 0 for the others, and so reports a lower number on the same
states). position_accuracy at k: share of counted slots whose draft argmax is the *target's* argmax
(not the data's token), with the Markov bias of the data's previous token; full_accuracy: share of
full blocks with all B right. Losses are the weighted means of the objective.

Calibration: a slot of confidence c and acceptance a counts as a parts accepted and 1-a parts
rejected, in BINS equal bins of c. ECE = sum over bins of share * |mean c - mean a|; AUROC from the
same bins, ties within a bin counted half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.train.data.batch import Batch
from dspark.train.objective.objective import ObjectiveOutput
from dspark.train.objective.slots import SlotInputs

BINS = 100
Score = dict[str, float | int | list[float] | None]

_SCALARS = (
    "blocks",
    "slots",
    "full_blocks",
    "full_correct",
    "tau",
    "ce",
    "ce_weight",
    "l1",
    "weight",
    "confidence",
    "confidence_weight",
    "confidence_abs_error",
    "confidence_bias",
    "kl",
    "kl_weight",
)


class SlotMetrics:
    """Sums over any number of rows. ``sums`` is one float64 vector, so that ranks need one
    all-reduce.
    """

    def __init__(self, block_size: int, device: torch.device | str = "cpu") -> None:
        self.block_size = block_size
        self.sums = torch.zeros(
            len(_SCALARS) + 3 * block_size + 3 * BINS, dtype=torch.float64, device=device
        )

    def add(self, batch: Batch, slots: SlotInputs, out: ObjectiveOutput) -> None:
        """Add one row. No value leaves the device."""
        wide = torch.float64
        accept, weight = out.accept.to(wide), slots.weight.to(wide)

        accepts, hits = batch.in_blocks(accept), batch.in_blocks(out.hit.to(wide))
        full = batch.counted.all(1).to(wide)
        length = 1 + accepts.cumprod(1).sum(1)
        zero = accept.new_zeros(())
        known = weight * out.ce_known
        scalars = [
            batch.anchor_valid.sum().to(wide),
            batch.counted.sum().to(wide),
            full.sum(),
            (full * hits.prod(1)).sum(),
            (full * length).sum(),
            (known * out.ce.to(wide)).sum(),
            known.sum(),
            (weight * out.l1.to(wide)).sum(),
            weight.sum(),
        ]
        bins = self.sums.new_zeros(3, BINS)
        if out.confidence is None or out.confidence_probability is None:
            scalars += [zero] * 4
        else:
            guess = out.confidence_probability.to(wide)
            scalars += [
                (weight * out.confidence.to(wide)).sum(),
                weight.sum(),
                (weight * (guess - accept).abs()).sum(),
                (weight * (guess - accept)).sum(),
            ]
            at = (guess.nan_to_num() * BINS).long()  # the loop reports a NaN
            at = at.clamp(max=BINS - 1)
            values = torch.stack([torch.ones_like(guess), guess, accept])
            bins = bins.index_add(1, at, values)
        scalars += (
            [zero] * 2 if out.kl is None else [(weight * out.kl.to(wide)).sum(), weight.sum()]
        )
        per_slot = [accepts.sum(0), hits.sum(0), batch.counted.sum(0).to(wide)]
        self.sums += torch.cat([torch.stack(scalars), *per_slot, bins.flatten()])

    def to_host(self) -> SlotMetrics:
        """Return the sums on the CPU. From a GPU the copy is only queued: wait for the queue before
        reading it.
        """
        copy = SlotMetrics(self.block_size)
        copy.sums = self.sums.to("cpu", non_blocking=True)
        return copy

    def merge(self, other: SlotMetrics) -> None:
        assert other.block_size == self.block_size
        self.sums += other.sums.to(self.sums.device)

    def result(self) -> Score:
        """Return the keys of ``dspark-tools score`` and a few more; None if nothing was counted."""
        size = self.block_size
        values = self.sums.cpu()
        s = dict(zip(_SCALARS, values[: len(_SCALARS)].tolist(), strict=True))
        accept, hit, count = values[len(_SCALARS) : len(_SCALARS) + 3 * size].view(3, size).tolist()
        bins = values[len(_SCALARS) + 3 * size :].view(3, BINS)
        return {
            "ce_loss": _ratio(s["ce"], s["ce_weight"]),
            "l1_loss": _ratio(s["l1"], s["weight"]),
            **({"kl_loss": s["kl"] / s["kl_weight"]} if s["kl_weight"] else {}),
            "confidence_loss": _ratio(s["confidence"], s["confidence_weight"]),
            "accept_rate": [a / c if c else 0.0 for a, c in zip(accept, count, strict=True)],
            "mean_accepted_length": _ratio(s["tau"], s["full_blocks"]),
            "position_accuracy": [a / c if c else 0.0 for a, c in zip(hit, count, strict=True)],
            "full_accuracy": _ratio(s["full_correct"], s["full_blocks"]),
            "confidence_abs_error": _ratio(s["confidence_abs_error"], s["confidence_weight"]),
            "confidence_bias": _ratio(s["confidence_bias"], s["confidence_weight"]),
            "confidence_ece": expected_calibration_error(bins) if s["confidence_weight"] else None,
            "confidence_auroc": auroc(bins) if s["confidence_weight"] else None,
            "blocks": round(s["blocks"]),
            "full_blocks": round(s["full_blocks"]),
            "slots": round(s["slots"]),
        }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def expected_calibration_error(bins: Tensor) -> float | None:
    """``bins`` [3, BINS]: count, sum of confidence, sum of acceptance of each bin."""
    count, guess, accept = bins
    total = float(count.sum())
    return float((guess - accept).abs().sum()) / total if total else None


def auroc(bins: Tensor) -> float | None:
    """Return the probability that an accepted token had more confidence than a rejected one, from
    the bins; None if all are of one kind.
    """
    count, _, accepted = bins
    rejected = count - accepted
    below = rejected.cumsum(0) - rejected
    pairs = float(accepted.sum() * rejected.sum())
    return float((accepted * (below + 0.5 * rejected)).sum()) / pairs if pairs > 0 else None
