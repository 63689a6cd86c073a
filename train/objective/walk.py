"""The walk: how long accepted blocks are at the positions where decoding starts them, computed from
a store alone. tau is a mean over anchors drawn anywhere, but decoding starts each block where the
last one failed, at hard positions. The walk follows it: of a supervised run of tokens the first
begins a block, ``s(first) = 1``; a block that begins at a accepts exactly n tokens with probability
``prod_{j<n} alpha_j(a) (1
- alpha_n(a))``, and the next one begins at ``a + n + 1``, on the data's token there. walk = tokens
  / sum of s: the tokens of all runs but each one's first, which decoding has from the prompt, over
  the expected number of blocks. The recursion is exact.

alpha = 1 - TV gives the walk at temperature 1. Greedily alpha is 1 where the draft's argmax is the
target's, else 0: on the data's previous tokens (``forced``), or, as decoding does it, on the
draft's own (``walk_greedy``). If the data are the target's own answers, the greedy walk *is*
decoding's mean accepted length, and the other one is its expectation.

Legend: M anchors of a row, all that are eligible, in ascending order; B slots; K kinds of alpha; H
hidden size; Vd draft vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark.train.objective.chunks import CHUNK_LOGITS
from dspark.train.objective.objective import ObjectiveOutput
from dspark.train.objective.slots import SlotInputs

if TYPE_CHECKING:  # the draft's types depend on the objective
    from collections.abc import Callable

    from dspark.train.data.batch import Batch

Float64 = npt.NDArray[np.float64]
KINDS = ("forced", "greedy", "sampled")  # of alpha, in the order of ``Walk.blocks``
# Names in ``score`` and in validation rows.
KEYS = {"walk": "sampled", "walk_greedy": "greedy", "walk_greedy_forced": "forced"}


class Walk:
    """Sums over rows; ``sums`` float64 [1 + K] = tokens and expected blocks of each kind, so that
    ranks need one all-reduce.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(1 + len(KINDS), dtype=torch.float64, device=device)

    def add(self, alpha: Tensor, anchors: Tensor) -> None:
        """Add a row: ``alpha`` [K, M, B] in [0, 1], 0 where a slot does not count; ``anchors``
        int64[M], every eligible position.
        """
        blocks = [
            visits(a, anchors.cpu().numpy()).sum() for a in alpha.to("cpu", torch.float64).numpy()
        ]
        self.sums += self.sums.new_tensor([anchors.shape[0], *blocks])

    def result(self) -> dict[str, float | None]:
        """Return ``walk`` and its greedy forms; None if there was no anchor."""
        tokens, *blocks = self.sums.tolist()
        by_kind = dict(zip(KINDS, blocks, strict=True))
        return {key: tokens / by_kind[kind] if tokens else None for key, kind in KEYS.items()}


def stops(alpha: Float64) -> Float64:
    """Return the probabilities [M, B + 1] that a block accepts exactly 0..B tokens, from ``alpha``
    [M, B].
    """
    reached = np.concatenate([np.ones((alpha.shape[0], 1)), alpha.cumprod(1)], 1)
    failed = np.concatenate([1 - alpha, np.ones((alpha.shape[0], 1))], 1)
    out: Float64 = reached * failed
    return out


def visits(alpha: Float64, anchors: npt.NDArray[np.int64]) -> Float64:
    """Return s [M]: the probability that a block begins at each anchor. All runs of neighbouring
    anchors at once, from left to right.
    """
    count, size = alpha.shape
    out = np.zeros(count)
    if count == 0:
        return out
    first = np.flatnonzero(np.diff(anchors, prepend=anchors[0] - 2) != 1)
    lengths = np.diff(first, append=count)
    longest = int(lengths.max())
    at = first[:, None] + np.arange(longest)
    inside = np.arange(longest) < lengths[:, None]
    step = np.where(inside[..., None], stops(alpha)[np.minimum(at, count - 1)], 0.0)
    # A block may extend past the end of its run; no block starts there.
    s = np.zeros((first.size, longest + size + 1))
    s[:, 0] = 1.0
    for i in range(longest):
        s[:, i + 1 : i + size + 2] += s[:, i, None] * step[:, i]
    out[at[inside]] = s[:, :longest][inside]
    return out


@torch.no_grad()
def alphas(
    batch: Batch,
    h: Tensor,
    slots: SlotInputs,
    out: ObjectiveOutput,
    target_logits: Callable[[Tensor], Tensor],
    drafted: Callable[[Tensor, Tensor], Tensor],
    vocab_size: int,
) -> Tensor:
    """alpha of every kind, [K, M, B] on the CPU, for the anchors of ``batch`` that are not padding.

    ``h`` [A, B, H] of its blocks, ``slots`` and ``out`` are the objective's input and output.
    ``target_logits``: last states [n, H] -> [n, V]; ``drafted``: [n, B, H] and anchor ids int64[n]
    -> the tokens int64[n, B] that the draft greedily proposes there, on its own tokens.
    """
    real = int(batch.anchor_valid.sum())
    size, most = batch.block_size, CHUNK_LOGITS.get(h.device.type, CHUNK_LOGITS["cpu"])
    best = torch.cat(
        [target_logits(part).argmax(-1) for part in _parts(slots.target, most // vocab_size)]
        or [batch.slots.new_empty(0)]
    )
    ids = batch.input_ids[batch.anchors[:real]]
    some = most // (vocab_size * size)
    tokens = torch.cat(
        [drafted(*pair) for pair in zip(_parts(h[:real], some), _parts(ids, some), strict=True)]
        or [ids.new_empty(0, size)]
    )
    at = (
        torch.arange(best.shape[0], device=best.device)
        if slots.target_at is None
        else slots.target_at
    )
    own = tokens.new_full((batch.anchors.shape[0], size), -1)
    own[:real] = tokens
    greedy = own.flatten()[batch.slots] == best[at]
    kinds = [out.hit.double(), greedy.double(), out.accept.double()]
    return torch.stack([batch.in_blocks(kind)[:real] for kind in kinds]).cpu()


def _parts(rows: Tensor, size: int) -> list[Tensor]:
    size = max(1, size)
    return [rows[at : at + size] for at in range(0, rows.shape[0], size)]
