"""The slots of a row that count, their weights, and what a step's sums are divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dspark.train.data.batch import Batch
from dspark.train.objective.states import SlotStates


def slot_weights(block_size: int, decay: float, device: torch.device | str = "cpu") -> Tensor:
    """Return ``exp(-k / decay)`` of every slot, float32[B]; ones if ``decay`` is 0. Made on
    ``device``, since a copy would wait for it.
    """
    if decay == 0:
        return torch.ones(block_size, device=device)
    return torch.exp(-torch.arange(block_size, dtype=torch.float32, device=device) / decay)


class HasSlots(Protocol):
    """A batch, or a row that makes no other view than these: ``counted`` bool[A, B], ``label_ids``
    int64[A, B].
    """

    @property
    def counted(self) -> Tensor: ...
    @property
    def label_ids(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Denominators:
    """The sums of weights that each term is divided by; add them over all rows (and ranks) of a
    step.
    """

    ce: float
    l1: float
    confidence: float

    def __add__(self, other: Denominators) -> Denominators:
        return Denominators(
            self.ce + other.ce, self.l1 + other.l1, self.confidence + other.confidence
        )

    @classmethod
    def of(cls, row: HasSlots, decay: float, to_draft: Tensor | None = None) -> Denominators:
        """Compute those of one row; cheap, without a model. Call it on a row or batch on the CPU,
        before the row is moved.
        """
        counted = row.counted
        weight = slot_weights(counted.shape[1], decay, counted.device) * counted
        total = float(weight.sum(dtype=torch.float64))
        if to_draft is None:
            return cls(total, total, total)
        labels = row.label_ids
        known = to_draft.to(labels.device)[labels] >= 0
        return cls(float((weight * known).sum(dtype=torch.float64)), total, total)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of ``slots`` and their run of ``rows`` of ``SlotInputs.target``; never more rows than
    slots.
    """

    slots: slice
    rows: slice


@dataclass(frozen=True, slots=True)
class SlotInputs:
    """The counted slots of a row: ``h`` [N, H], ``z`` [N, r] and ``w2`` [Vd, r] or None,
    ``confidence`` logits [N] or None, ``target`` [D, H] last states after the target's final norm,
    ``labels`` int64[N] target ids, ``weight`` [N].

    Slot i is compared with row ``target_at[i]`` of ``target``, int64[N], increasing by 0 or 1;
    ``target_at_host`` is the same on the CPU (it may be omitted if ``target_at`` is on the CPU
    already). Without ``target_at`` each slot has its own row, D = N.
    """

    h: Tensor
    z: Tensor | None
    w2: Tensor | None
    confidence: Tensor | None
    target: Tensor
    labels: Tensor
    weight: Tensor
    target_at: Tensor | None = None
    target_at_host: Tensor | None = None

    @classmethod
    def gather(cls, batch: Batch, states: SlotStates, decay: float) -> SlotInputs:
        """Gather the slots that count, so that no logits are computed for the others."""
        # index_select, not [at]: no slot occurs twice, and the backward pass of [at] sorts the
        # indices to sum duplicates.
        at = batch.slots
        weight = slot_weights(batch.block_size, decay, at.device)
        return cls(
            h=states.h.flatten(0, 1).index_select(0, at),
            z=None if states.z is None else states.z.flatten(0, 1).index_select(0, at),
            w2=states.w2,
            confidence=None
            if states.confidence is None
            else states.confidence.flatten().index_select(0, at),
            target=batch.last[batch.target_rows],
            labels=batch.label_ids.flatten()[at],
            weight=weight[at % batch.block_size],
            target_at=batch.target_at,
            target_at_host=batch.target_at_host,
        )

    def chunks(self, rows: int) -> list[Chunk]:
        """Yield all slots, ``rows`` at a time. Nothing here waits for the device."""
        count = self.labels.shape[0]
        at = self.target_at if self.target_at_host is None else self.target_at_host
        at = torch.arange(count) if at is None else at
        assert at.device.type == "cpu", (
            "reading target_at would wait for the device: give target_at_host"
        )
        starts = list(range(0, count, rows))
        ends = [min(start + rows, count) for start in starts]
        firsts, lasts = at[starts].tolist(), at[[end - 1 for end in ends]].tolist()
        return [
            Chunk(slice(start, end), slice(first, last + 1))
            for start, end, first, last in zip(starts, ends, firsts, lasts, strict=True)
        ]
