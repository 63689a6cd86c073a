"""The reduced vocabulary in a checkpoint: ``d2t`` int64[Vd] holds offsets (target id = row +
d2t[row]), ``t2d`` bool[V] marks the ids.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def ids_of(offsets: Tensor) -> Tensor:
    """Return the target ids int64[Vd] of the rows of the draft's vocabulary, from ``d2t``."""
    return torch.arange(offsets.shape[0]) + offsets.to(torch.int64)


def offsets_of(ids: Tensor) -> Tensor:
    """The inverse of ``ids_of``."""
    return ids - torch.arange(ids.shape[0])


def faults(tensors: Mapping[str, Tensor], size: int, whole: int) -> list[str]:
    """Return what is wrong with ``d2t``, ``t2d`` and the output matrix of a checkpoint with
    ``size`` of ``whole`` ids.
    """
    offsets, present = tensors.get("d2t"), tensors.get("t2d")
    if size >= whole:
        if offsets is None:
            return []
        return [
            f"found d2t, but the vocabulary is not reduced (draft_vocab_size {size} of {whole}): "
            "the two contradict each other"
        ]
    missing = [
        f"draft_vocab_size {size} of {whole} needs {name}, which model.safetensors lacks"
        for name in ("d2t", "lm_head.weight")
        if name not in tensors
    ]
    if offsets is None:
        return missing
    if offsets.shape != (size,):
        return [*missing, f"d2t is {list(offsets.shape)}, draft_vocab_size says [{size}]"]
    return [*missing, *_wrong_ids(offsets, present, whole)]


def _wrong_ids(offsets: Tensor, present: Tensor | None, whole: int) -> list[str]:
    ids = ids_of(offsets)
    if _fits(ids, whole):
        same = present is None or torch.equal(present.nonzero().flatten(), ids)
        return [] if same else ["d2t and t2d name different tokens"]
    outside = int(ids.min()) < 0 or int(ids.max()) >= whole
    hint = "d2t holds offsets: id = row + d2t[row]"
    if _fits(offsets.long(), whole):
        hint = "the values look like token ids, but d2t holds offsets: id - row"
    return [
        (
            "d2t gives "
            f"{f'ids outside 0..{whole - 1}' if outside else 'ids that do not ascend'}; {hint}"
        )
    ]


def _fits(ids: Tensor, whole: int) -> bool:
    return bool((ids[1:] > ids[:-1]).all()) and int(ids.min()) >= 0 and int(ids.max()) < whole
