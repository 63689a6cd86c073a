"""Which positions of a packed row start a block, and which slots of those blocks count. Pure numpy,
no randomness.

Legend: S tokens of the row, A anchors, B slots of a block. ``doc`` int32[S] numbers the documents
of the row from 0, -1 on padding; a document is one run of equal numbers. Slot k of anchor a
predicts x[a+k+1].

Randomness stays with the caller, which passes one priority per position: a row then has the same
anchors on any number of ranks and after any resume, and a test can predict them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dspark.cache.records import last_rows

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


def positions(doc: Int32) -> Int64:
    """Return the position of every token within its document, int64[S] (padding counts as one more
    document).
    """
    index = np.arange(doc.size, dtype=np.int64)
    starts = np.ones(doc.size, dtype=np.bool_)
    starts[1:] = doc[1:] != doc[:-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0)) if doc.size else index


def eligible(loss_mask: Bool, doc: Int32) -> Bool:
    """Tell which positions may be an anchor, bool[S]: p and p+1 supervised, in one document, not
    padding.

    These are also the positions whose last state is stored (``cache.records.last_rows`` of each
    document), so ``last_index`` needs only this mask.
    """
    out = last_rows(loss_mask)
    out[:-1] &= (doc[:-1] == doc[1:]) & (doc[:-1] >= 0)
    return out


def last_index(loss_mask: Bool, doc: Int32) -> Int64:
    """Return the row of ``last`` (documents concatenated) that holds the state of position p, or
    -1; int64[S].
    """
    stored = eligible(loss_mask, doc)
    return np.where(stored, np.cumsum(stored) - 1, -1).astype(np.int64)


def choose(candidates: Bool, priority: Float64, max_anchors: int) -> Int64:
    """Return the ``max_anchors`` candidates of highest priority as sorted positions, int64[<=
    max_anchors]; 0 takes all.

    With independent uniform priorities this is a uniform draw without replacement. Ties go to the
    earlier position, so the result does not depend on the sort.
    """
    if max_anchors < 0:
        raise ValueError(f"max_anchors is {max_anchors}; expected 0 (all) or a positive number")
    where = np.flatnonzero(candidates).astype(np.int64)
    if max_anchors == 0 or where.size <= max_anchors:
        return where
    order = np.argsort(-priority[where], kind="stable")
    return np.sort(where[order[:max_anchors]])


def slots(anchors: Int64, loss_mask: Bool, doc: Int32, block_size: int) -> tuple[Int64, Bool]:
    """Return label positions and which slots count: ``(label_index int64[A, B], counted bool[A,
    B])``.

    A slot counts if its label is inside the row and the anchor's document and is supervised, and if
    all slots before it count: a draft is verified left to right, so nothing after a gap can ever be
    accepted. Blocks at an end are shortened, not dropped; ``label_index`` of a slot outside the row
    is clamped so that it can be gathered.
    """
    label = anchors[:, None] + np.arange(1, block_size + 1, dtype=np.int64)[None, :]
    safe = np.minimum(label, max(doc.size - 1, 0))
    own = doc[anchors][:, None]
    fits = (label < doc.size) & loss_mask[safe] & (doc[safe] == own) & (own >= 0)
    return safe, np.logical_and.accumulate(fits, axis=1)


def by_target(label_index: Int64, counted: Bool, last_index: Int64) -> tuple[Int64, Int64, Int64]:
    """Return the counted slots, sorted by row of ``last``, as flat indices int64[N]; those rows,
    each once, int64[D]; and which of the D each slot has, int64[N], which therefore increases by 0
    or 1. Blocks of neighbouring anchors overlap, so several slots share one target distribution:
    side by side they share its logits.
    """
    flat = np.flatnonzero(counted)
    # The target of slot k of anchor a is at position a+k, the one before its label.
    row = last_index[label_index.reshape(-1)[flat] - 1]
    order = np.argsort(row, kind="stable")
    rows, at = np.unique(row[order], return_inverse=True)
    return flat[order].astype(np.int64), rows.astype(np.int64), at.astype(np.int64)
