"""Find the step at which rows take the bits asked for, with few measurements.

A measurement packs and compresses tens of megabytes. What independent Gaussians of the columns'
deviations would take costs nothing and falls with the step as the measured bits do, up to a factor
that hardly changes near the step looked for. So the search goes along that curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

TOLERANCE = 1e-3  # of the bits asked for
MOST = 24  # measurements
NEAREST = 5e-4  # of the logarithm of the step: nearer ones are not told apart
STEEPEST = 3.0  # power of the model that measured bits may follow, or one by it
FINE, FINEST = 1e-2, 16.0  # deviations in steps that are tabulated; a finer step adds log2
ENTRIES = 600

Float64 = npt.NDArray[np.float64]


@lru_cache(maxsize=1)
def _table() -> tuple[Float64, Float64]:
    """Return logarithms of deviations in steps, and the bits of each."""
    import torch

    at = torch.linspace(math.log(FINE), math.log(FINEST), ENTRIES, dtype=torch.float64)
    edges = (torch.arange(8 * int(FINEST) + 1) + 0.5) / at.exp()[:, None] / math.sqrt(2)
    beyond = torch.special.erfc(edges)  # of both tails
    share = torch.cat([1 - beyond[:, :1], (beyond[:, :-1] - beyond[:, 1:]) / 2], 1)
    bits = -share * share.clamp(min=1e-300).log2()
    return at.numpy(), (bits[:, 0] + 2 * bits[:, 1:].sum(1)).numpy()


def gaussian_bits(deviations: Float64, step: float) -> float:
    """Return the entropy, in bits, of a row of independent Gaussians of ``deviations`` [K] that are
    rounded to multiples of ``step``.
    """
    at, bits = _table()
    size = np.log(deviations[deviations > 0] / step)
    more = np.maximum(size - at[-1], 0.0).sum() / math.log(2)
    return float(np.interp(size, at, bits, left=0.0).sum() + more)


def gaussian_step(deviations: Float64, bits: float) -> float:
    """Return the step at which ``gaussian_bits`` is ``bits``; ``deviations`` not all zero."""
    largest = math.log(float(deviations.max()))
    low, high = largest - 40.0, largest - math.log(FINE)
    for _ in range(50):
        middle = (low + high) / 2
        if gaussian_bits(deviations, math.exp(middle)) > bits:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def step_for(bits_at: Callable[[float], float], deviations: Float64, bits: float) -> float:
    """Find the step at which ``bits_at(step)``, which falls with it, is ``bits`` within
    ``TOLERANCE``, for columns of ``deviations`` [K].

    Measured bits are taken for a power of ``gaussian_bits``, times a factor: the first power, until
    two measurements tell another. Where that leaves the steps between one that took too many and
    one that took too few, the next step is halfway between them, or of twice or half the size while
    one of the two is not known.
    """
    if not deviations.any():
        return 1.0
    low, high = -math.inf, math.inf  # logarithms of steps that take too many, too few
    at, power, before = math.log(gaussian_step(deviations, bits)), 1.0, (0.0, 0.0)
    for n in range(MOST):
        step = math.exp(at)
        found = bits_at(step)
        if abs(found - bits) <= TOLERANCE * bits:
            break
        low, high = (at, high) if found > bits else (low, at)
        if high - low < NEAREST:
            break
        if found > 0:
            now = math.log(gaussian_bits(deviations, step)), math.log(found)
            if n and now[0] != before[0]:
                told = (now[1] - before[1]) / (now[0] - before[0])
                power = min(max(told, 1 / STEEPEST), STEEPEST)
            before = now
            wanted = now[0] + (math.log(bits) - now[1]) / power
            at = math.log(gaussian_step(deviations, math.exp(wanted)))
        if not low < at < high:
            at = _between(low, high)
    return step


def _between(low: float, high: float) -> float:
    if high == math.inf:
        return low + math.log(2)
    return high - math.log(2) if low == -math.inf else (low + high) / 2
