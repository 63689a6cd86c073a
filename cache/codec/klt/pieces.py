"""Pieces of states that the transform is fitted to, and those held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from dspark.cache.codec.base import Tokens
from dspark.cache.codec.klt.moments import EIGEN_COPIES, FISHER_ROWS, sums_bytes
from dspark.cache.codec.klt.rate import STEP_ROWS

if TYPE_CHECKING:
    import torch

PIECE = 4096  # tokens, in whole samples, that are on the device at once
HELD_OUT = 8  # of so many samples, one sets the step; the others are learnt from


STEP_COPIES = 8  # in float32, of the rows that set the step, while it is searched for


def room(device: torch.device, layers: int, hidden: int) -> int:
    """Return the free bytes of a GPU beside all that fitting takes there (it may be less than
    none), and 0 for another device. An engine may fill the rest of it.
    """
    import torch

    if device.type != "cuda":
        return 0
    width = (layers + 2) * hidden
    fitting = (
        2 * sums_bytes(width)
        + EIGEN_COPIES * sums_bytes(layers * hidden)
        + STEP_COPIES * 4 * STEP_ROWS * width
    )
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] - fitting


def resident(
    aux: torch.Tensor, last: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``aux`` [T, L, H] and ``last`` [M, H] on ``device`` if there is ``room`` for them;
    else as they are, so that each pass over them brings them piece by piece.
    """
    layers, hidden = aux.shape[1:]
    if aux.is_cuda or room(device, layers, hidden) < aux.nbytes + last.nbytes:
        return aux, last
    return aux.to(device), last.to(device)


class Piece(NamedTuple):
    """States of a run of samples: ``aux`` [T, L, H], ``last`` [M, H], any float dtype."""

    aux: torch.Tensor
    last: torch.Tensor
    tokens: Tokens


def pieces_of(
    aux: torch.Tensor, last: torch.Tensor, tokens: Tokens, held: npt.NDArray[np.bool_]
) -> tuple[list[Piece], list[Piece]]:
    """Return runs of whole samples of about ``PIECE`` tokens: those to learn from, and those of the
    samples that are ``held`` out, bool [N].
    """
    starts = tokens.sample_start.cpu().numpy()
    samples = len(starts) - 1
    ends = [0]
    for i in range(1, samples + 1):
        full = starts[i] - starts[ends[-1]] >= PIECE
        if full or i == samples or held[i] != held[i - 1]:
            ends.append(i)
    at = np.searchsorted(tokens.last_token.cpu().numpy(), starts[ends])
    out: tuple[list[Piece], list[Piece]] = ([], [])
    for n in range(len(ends) - 1):
        a, b = int(starts[ends[n]]), int(starts[ends[n + 1]])
        rows = slice(int(at[n]), int(at[n + 1]))
        own = dataclasses.replace(
            tokens,
            input_ids=tokens.input_ids[a:b],
            sample_start=tokens.sample_start[ends[n] : ends[n + 1] + 1] - a,
            last_token=tokens.last_token[rows] - a,
        )
        out[int(held[ends[n]])].append(Piece(aux[a:b], last[rows], own))
    return out


def one_in_eight(
    size: npt.NDArray[np.float64], fit: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Return which samples to hold out, bool [N]: every n-th of those ``fit`` for it, in the order
    of ``size``, so that the two kinds are alike in it; at least one.
    """
    order = np.argsort(size, kind="stable")
    order = order[fit[order]]
    held = np.zeros(len(size), np.bool_)
    held[order[min(HELD_OUT // 2, len(order) - 1) :: HELD_OUT]] = True
    return held


def spread(pieces: Sequence[Piece]) -> Iterator[torch.Tensor]:
    """Yield last states of all ``pieces``, about as many as ``fisher`` takes."""
    step = max(1, sum(p.last.shape[0] for p in pieces) // FISHER_ROWS)
    return (p.last[::step] for p in pieces)


def some_of(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Return every n-th piece, of about ``STEP_ROWS`` tokens together or all."""
    return pieces[:: max(1, round(sum(p.aux.shape[0] for p in pieces) / STEP_ROWS))]
