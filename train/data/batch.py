"""One packed training row as torch tensors: what the stream passes to the model.

Legend: S tokens of the row, L aux layers, Ht hidden size of the target, M stored last states, A
anchors, B slots of a block, N counted slots, D distinct target rows of them. There is no batch
axis: documents share a row, and an optimizer step takes several rows.

Which slots count, and which of them share a target distribution, is known before anything is
computed, so both are determined here on the CPU; a ``nonzero`` on the device would stall it once
per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark.train.data import anchors as rules

ON_HOST = frozenset({"target_at_host"})  # fields that stay on the CPU wherever the batch goes
TABLES = "tables"
# Makes them from ``doc``, ``anchors`` and ``anchor_valid``.
MakeTables = Callable[[Tensor, Tensor, Tensor], tuple[Mapping[str, Tensor], ...]]


@dataclass(frozen=True, slots=True)
class Batch:
    """``input_ids`` int64[S], ``loss_mask`` bool[S], ``doc`` int32[S] (-1 padding), ``position``
    int64[S] (restarts in each document), ``aux`` float[S, L, Ht] decoded, ``last`` float[M, Ht]
    after the target's final norm, ``last_index`` int64[S] (row of ``last`` or -1), ``anchors``
    int64[A] sorted, padding 0 at the end, ``anchor_valid`` bool[A], ``label_index`` int64[A, B],
    ``counted`` bool[A, B], ``slots`` int64[N] = flat indices of ``counted`` sorted by target row,
    ``target_rows`` int64[D] = those rows of ``last``, each once, ``target_at`` int64[N] = which of
    the D each slot has, ``draw`` int64[1] a number specific to the row for a type's random choices
    in each forward pass (0 in validation). ``target_at_host`` is ``target_at`` on the CPU, always:
    code that cuts the slots into chunks must know on the host which rows a chunk needs.
    ``tables``: those of the attention's mask (``draft.attention.MaskTables``), if a reader made
    them.
    """

    input_ids: Tensor
    loss_mask: Tensor
    doc: Tensor
    position: Tensor
    aux: Tensor
    last: Tensor
    last_index: Tensor
    anchors: Tensor
    anchor_valid: Tensor
    label_index: Tensor
    counted: Tensor
    slots: Tensor
    target_rows: Tensor
    target_at: Tensor
    target_at_host: Tensor
    draw: Tensor
    tables: tuple[Mapping[str, Tensor], ...] = ()

    @classmethod
    def build(
        cls,
        *,
        input_ids: rules.Int32 | rules.Int64,
        loss_mask: rules.Bool,
        doc: rules.Int32,
        aux: Tensor,
        last: Tensor,
        anchors: rules.Int64,
        block_size: int,
        pad_anchors_to: int = 0,
        draw: int = 0,
    ) -> Batch:
        """Build a batch from a row's arrays. ``last`` holds the stored states of all documents,
        concatenated (one per ``anchors.eligible`` position). ``pad_anchors_to`` pads A for a fixed
        shape; a padding anchor counts nowhere.
        """
        stored = int(rules.eligible(loss_mask, doc).sum())
        assert last.shape[0] == stored, (
            f"got {last.shape[0]} last states for {stored} positions that store one"
        )
        assert aux.shape[0] == input_ids.size == loss_mask.size == doc.size
        last_index = rules.last_index(loss_mask, doc)
        blocks = _blocks(anchors, loss_mask, doc, last_index, block_size, pad_anchors_to)
        return cls(
            input_ids=torch.from_numpy(input_ids.astype(np.int64)),
            loss_mask=torch.from_numpy(loss_mask),
            doc=torch.from_numpy(doc),
            position=torch.from_numpy(rules.positions(doc)),
            aux=aux,
            last=last,
            last_index=torch.from_numpy(last_index),
            draw=torch.tensor([draw]),
            tables=(),
            **blocks,
        )

    def with_anchors(self, host: Batch, anchors: rules.Int64, pad_anchors_to: int = 0) -> Batch:
        """Return this row with other ``anchors``, on the same device. ``host``: the same row on the
        CPU (its states are not used).
        """
        mask, doc, last_index = (x.numpy() for x in (host.loss_mask, host.doc, host.last_index))
        blocks = _blocks(anchors, mask, doc, last_index, self.block_size, pad_anchors_to)
        device = self.anchors.device
        moved = {n: t if n in ON_HOST else t.to(device) for n, t in blocks.items()}
        return replace(self, tables=(), **moved)

    @property
    def block_size(self) -> int:
        return int(self.label_index.shape[1])

    @property
    def label_ids(self) -> Tensor:
        """Return the data's next tokens, int64[A, B]: ``x[a+k+1]`` (any id where the slot does not
        count).
        """
        return self.input_ids[self.label_index]

    @property
    def slot_index(self) -> Tensor:
        """Return the position ``a+k`` of every slot in the row, clamped to the row, int64[A, B]."""
        offset = torch.arange(self.block_size, device=self.anchors.device)
        return (self.anchors[:, None] + offset).clamp(max=self.input_ids.shape[0] - 1)

    @property
    def prev_ids(self) -> Tensor:
        """Return the token before each label, int64[A, B]: ``x[a+k]``, which teacher-forces the
        Markov head.
        """
        return self.input_ids[self.slot_index]

    @property
    def block_position(self) -> Tensor:
        """Return the position ids of the slots within their document, int64[A, B]: ``position[a] +
        k``, past its end too.
        """
        offset = torch.arange(self.block_size, device=self.anchors.device)
        return self.position[self.anchors][:, None] + offset

    @property
    def target_row(self) -> Tensor:
        """Return the row of ``last`` with the target distribution of slot k, int64[A, B]:
        ``last_index[a+k]``; valid if counted.
        """
        return self.last_index[self.slot_index]

    def in_blocks(self, values: Tensor) -> Tensor:
        """``values`` [N] in the order of ``slots`` -> [A, B], 0 where a slot does not count."""
        flat = values.new_zeros(self.counted.numel())
        return flat.index_copy(0, self.slots, values).view_as(self.counted)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch on ``device``; ``dtype`` also casts the states (before the copy, so that
        fewer bytes move).
        """
        moved: dict[str, Any] = {
            TABLES: tuple({n: x.to(device) for n, x in of.items()} for of in self.tables)
        }
        for name in ARRAYS:
            value: Tensor = getattr(self, name)
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            moved[name] = value.to(device, non_blocking=True)
        return replace(self, **moved)


# Fields that are tensors and go to the device.
ARRAYS = tuple(f.name for f in fields(Batch) if f.name not in {*ON_HOST, TABLES})


def _blocks(
    anchors: rules.Int64,
    loss_mask: rules.Bool,
    doc: rules.Int32,
    last_index: rules.Int64,
    block_size: int,
    pad_to: int,
) -> dict[str, Tensor]:
    """Return the fields of a batch that depend on its anchors."""
    real = anchors.size
    total = max(real, pad_to)
    padded = np.zeros(total, dtype=np.int64)
    padded[:real] = anchors
    valid = np.arange(total) < real
    label, counted = rules.slots(padded, loss_mask, doc, block_size)
    counted &= valid[:, None]
    slots, rows, at = (torch.from_numpy(x) for x in rules.by_target(label, counted, last_index))
    arrays = {"anchors": padded, "anchor_valid": valid, "label_index": label, "counted": counted}
    return {
        **{name: torch.from_numpy(x) for name, x in arrays.items()},
        "slots": slots, "target_rows": rows, "target_at": at, "target_at_host": at,
    }  # fmt: skip
