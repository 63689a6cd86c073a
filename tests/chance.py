"""Tests of distributions with a fixed error rate."""

from __future__ import annotations

import torch


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Survival probability of Pearson's statistic, cells of fewer than 5 expected counts pooled."""
    small = expected < 5
    observed = torch.cat([counts[~small], counts[small].sum()[None]])
    wanted = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = wanted > 0
    statistic = ((observed - wanted)[keep] ** 2 / wanted[keep]).sum()
    freedom = torch.tensor((int(keep.sum()) - 1) / 2.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic.double() / 2))
