"""The data that flows between the stages: samples of token ids, a loss mask and hidden states. No
I/O here.

Legend: S tokens of one sample, L aux layers, H hidden size, M rows of the last state that are
stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
# Coded states: array name -> array, its first axis rows.
Coded = dict[str, npt.NDArray[np.generic]]


def last_rows(loss_mask: Bool) -> Bool:
    """Return which positions ``p`` of one sample have their last state stored: ``loss_mask[p] and
    loss_mask[p+1]``.

    These are exactly the positions that can be an anchor or give a slot's target distribution (slot
    ``k`` of anchor ``a`` needs the state at ``a+k`` and is counted only while ``x[a+k+1]`` and all
    before it are supervised). Returns bool[S]; the last position is never set.
    """
    out = np.zeros(loss_mask.shape, dtype=np.bool_)
    out[:-1] = loss_mask[:-1] & loss_mask[1:]
    return out


def joined_last_rows(loss_mask: Bool, sample_start: Int64) -> Bool:
    """Return ``last_rows`` of samples end to end: ``loss_mask`` bool[T], ``sample_start``
    int64[N + 1] the first token of each and T. A few steps for any number of samples: a step per
    sample, each taking Python's lock, slows the thread that launches a target's kernels.
    """
    out = last_rows(loss_mask)
    ends = sample_start[1:]
    out[ends[ends > sample_start[:-1]] - 1] = False
    return out


@dataclass(frozen=True, slots=True)
class TokenSample:
    """Tokens of one row of the corpus, or of some of its turns; the input of an engine.

    ``row``: number of the row in the source, 0-based; several samples may share it, in ascending
    order of (row, turn). ``key``: KEY_BYTES bytes, a hash of the conversation, by which validation
    is split: equal for all samples of a conversation, and for conversations that begin with the
    same prompt. ``input_ids``: int32[S]. ``loss_mask``: bool[S], true where the token itself is a
    label. ``turn``: number of the first assistant turn supervised in it, 0-based.
    """

    row: int
    key: bytes
    input_ids: Int32
    loss_mask: Bool
    turn: int = 0

    def __post_init__(self) -> None:
        assert len(self.key) == KEY_BYTES
        assert self.input_ids.dtype == np.int32
        assert self.loss_mask.dtype == np.bool_
        assert self.input_ids.shape == self.loss_mask.shape


@dataclass(frozen=True, slots=True)
class CodedSample:
    """A ``TokenSample`` with its states as the codec stores them; what the writer takes and the
    trainer reads.

    ``states``: the codec's arrays by their full names (``codec/base.py``), S rows each where their
    axis is ``token``, M = ``last_rows(loss_mask).sum()`` where it is ``last``, X where it is
    ``exact``; then ``EXACT_TOKEN`` int64[X] too.
    """

    tokens: TokenSample
    states: Coded


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded sample, as ``Cache.__getitem__`` returns it.

    ``input_ids`` int32[S], ``loss_mask`` bool[S], ``aux`` float32[S, L, H], ``last`` float32[S, H]
    after the final norm (rows that are not stored are zero), ``last_mask`` bool[S].
    """

    row: int
    key: bytes
    input_ids: Int32
    loss_mask: Bool
    aux: Float32
    last: Float32
    last_mask: Bool
