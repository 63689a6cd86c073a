"""The fixed rotation of a group of channels: signs, then a Walsh-Hadamard transform. Pure
arithmetic, no randomness.

A hidden state has a few channels thousands of times larger than the rest. Quantised directly, the
large ones would set the step and the small ones would be lost; after the rotation every coefficient
of a group is a sum of all its channels, so the group is close to Gaussian and one scale serves it.
The signs keep a constant vector (or any other row of the Hadamard matrix) from becoming a single
spike.

Legend: g channels of a group, N groups. docs/format.md defines the same with formulas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

GROUP_LEAST = 8  # below this the scale costs more than a bit per value


def group_size(hidden: int, limit: int) -> int:
    """Return the largest power of two that divides ``hidden``, at most ``limit``."""
    return min(hidden & -hidden, limit)


def fmix32(i: int) -> int:
    """Apply MurmurHash3's 32-bit finaliser, an integer hash that can be reproduced in any language
    without a random generator.
    """
    i ^= i >> 16
    i = i * 0x85EBCA6B & 0xFFFFFFFF
    i ^= i >> 13
    i = i * 0xC2B2AE35 & 0xFFFFFFFF
    return i ^ (i >> 16)


def signs(g: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return the sign of each channel of a group, float32[g]: -1 where ``fmix32(i + 1)`` is odd.
    The same in every group of a row.
    """
    return np.array([1.0 - 2.0 * (fmix32(i + 1) & 1) for i in range(g)], dtype=np.float32)


def hadamard(g: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return the Walsh-Hadamard matrix in natural order, float32[g, g]: entry ``(i, j)`` is -1 to
    the number of ones in ``i & j``.
    """
    out = np.ones((1, 1), dtype=np.float32)
    while out.shape[0] < g:
        out = np.block([[out, out], [out, -out]])
    return out


def unrotation(g: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """float32[g, g] such that ``rotated[N, g] @ unrotation`` is g times the groups: the matrix, its
    columns with their signs.
    """
    return hadamard(g) * signs(g)


def rotate(x: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Apply signs ``flip[g]``, then the unnormalised transform (a factor sqrt(g)), to groups that
    are columns: float32[g, N] -> [g, N].

    Butterflies in a fixed order, each an addition of two float32 numbers, so the result is the same
    to the last bit on every device; a matrix product would sum in its own order. Groups are columns
    so that every pass runs over contiguous memory.
    """
    import torch

    g, n = x.shape
    y = x * flip[:, None]
    other = torch.empty_like(y)
    half = 1
    while half < g:
        a, b = y.view(-1, 2, half, n).unbind(1)
        to = other.view(-1, 2, half, n)
        torch.add(a, b, out=to[:, 0])
        torch.sub(a, b, out=to[:, 1])
        y, other = other, y
        half *= 2
    return y


def energy(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each column, float32[g, N] -> float32[N], halving: entry i plus
    entry i + g/2, then again.
    """
    e = x * x
    while e.shape[0] > 1:
        a, b = e.chunk(2)
        e = a + b
    return e[0]
