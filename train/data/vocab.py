"""``--draft-vocab-size``: choose which target ids a draft can propose: the most frequent supervised
ids of the store.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dspark.cache.errors import TrainError, UsageError
from dspark.cache.joined import Stores
from dspark.train.data.anchors import Int64


def choose_ids(cache: Stores, samples: Int64, size: int) -> tuple[Tensor, float]:
    """Return ``size`` ascending target ids int64[Vd] and the share of supervised tokens they cover.

    Most frequent first, ties to the lower id; ids that never occur fill up from the lowest. Raises
    when none of the supervised tokens would be covered: training would then see no label at all.
    """
    vocab = cache.manifest.target.vocab_size
    if not 0 < size <= vocab:
        raise UsageError(
            f"--draft-vocab-size {size}: expected 1 to {vocab}, the target's vocabulary"
        )
    counts = _supervised(cache, samples)
    order = np.lexsort((np.arange(vocab), -counts))
    kept = np.sort(order[:size])
    return torch.from_numpy(kept.astype(np.int64)), float(counts[kept].sum() / counts.sum())


def covered(cache: Stores, samples: Int64, ids: Tensor) -> float:
    """Return the share of supervised tokens that the target ids ``ids`` int64[Vd] cover. Raises
    TrainError if they cover none.
    """
    counts = _supervised(cache, samples)
    share = float(counts[ids.numpy()].sum() / counts.sum())
    if share == 0:
        raise TrainError(
            f"{cache.path}: none of its supervised tokens is in the draft's vocabulary of "
            f"{len(ids)}; give another --draft-vocab-size"
        )
    return share


def _supervised(cache: Stores, samples: Int64) -> Int64:
    """Count how often each target id is supervised, int64[V]. Raises TrainError if none is."""
    vocab = cache.manifest.target.vocab_size
    counts = np.zeros(vocab, np.int64)
    for i in samples:
        tokens = cache.tokens(int(i))
        counts += np.bincount(tokens.input_ids[tokens.loss_mask], minlength=vocab)
    if not counts.any():
        raise TrainError(f"{cache.path}: no supervised token in the training samples")
    return counts
