"""One packed row as a single buffer, which a reader writes where the device can copy it from
(``slots.py``).

A row is some fifteen arrays. Sent separately, each costs a file descriptor, a page-locked
allocation and a launch, 3.8 ms per row on an H100 whatever their size; here they are concatenated
and read back as views.

Legend: S tokens of the row, L aux layers, Ht hidden size of the target, M stored last states, N
counted slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from dspark.cache.codec.base import EXACT_TOKEN, Tokens, axis_of, from_first_token
from dspark.cache.errors import MismatchError
from dspark.cache.joined import Stores
from dspark.cache.records import CodedSample, last_rows
from dspark.train.data.batch import ARRAYS, Batch
from dspark.train.data.slots import Room, Slot

CODES = "codes."  # what a codec's arrays are called in the buffer
KNOWN = "known."  # and what it predicts from
MASK = "mask."  # and the tables of the attention's mask
ALIGN = (
    # bytes; every field starts at a multiple, so that any dtype can view it and vector loads are
    # aligned
    64
)

Array = np.ndarray[Any, np.dtype[Any]]


class Field(NamedTuple):
    """The place of one array in the buffer: ``start`` in bytes. A plain tuple, since a row's some
    twenty go from a reader to the loop.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def of(self, data: Tensor) -> Tensor:
        """Return the array as a view of ``data`` uint8[bytes]."""
        return self.within(data.view(self.dtype))

    def within(self, data: Tensor) -> Tensor:
        """Return the array as a view of the buffer seen in the array's own dtype."""
        at = data.storage_offset() + self.start // self.dtype.itemsize
        return data.as_strided(self.shape, _strides(self.shape), at)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A ``Batch`` without decoded states but with their codes, in ``data`` uint8[bytes].
    ``tokens``: tokens of documents, without padding; ``slots``: N; ``store``: the store that its
    samples come from; ``lent``: the memory of ``data``, if readers use it again.
    """

    data: Tensor
    fields: tuple[Field, ...]
    tokens: int
    slots: int
    store: int = 0
    lent: Slot | None = None

    @classmethod
    def build(
        cls,
        batch: Batch,
        samples: Sequence[CodedSample],
        tokens: int,
        store: int = 0,
        room: Room | None = None,
    ) -> Self:
        """Build a row from a batch whose ``aux`` [S, 0] and ``last`` [M, 0] are empty, and its
        samples. Codes are joined in place, in ``room``; padding rows are zero.
        """
        arrays: list[tuple[str, int, Sequence[Array]]] = []
        for name in ARRAYS:
            value: Tensor = getattr(batch, name)
            arrays.append((f"batch.{name}", value.shape[0], [value.numpy()]))
        for i, tables in enumerate(batch.tables):
            arrays += [(f"{MASK}{i}.{n}", t.shape[0], [t.numpy()]) for n, t in tables.items()]
        of_axis = {"token": batch.aux.shape[0], "last": batch.last.shape[0]}
        known = tokens_on_host(samples)
        # only a codec that predicts from tokens stores some exactly
        if EXACT_TOKEN in samples[0].states:
            arrays += [(KNOWN + name, len(value), [value]) for name, value in known.items()]
        for name in samples[0].states:
            pieces: Sequence[Array] = [s.states[name] for s in samples]
            if name == EXACT_TOKEN:
                pieces = from_first_token(samples)
            arrays.append((CODES + name, of_axis.get(axis_of(name), sum(map(len, pieces))), pieces))
        fields, end = [], 0
        for name, rows, parts in arrays:
            dtype = torch.from_numpy(np.empty(0, parts[0].dtype)).dtype
            fields.append(Field(name, dtype, (rows, *parts[0].shape[1:]), end))
            end += -(-rows * int(np.prod(parts[0].shape[1:])) * dtype.itemsize // ALIGN) * ALIGN
        data = (room or Room())(end)
        for field, (_, _, parts) in zip(fields, arrays, strict=True):
            out = field.of(data).numpy()
            used = sum(len(part) for part in parts)
            np.concatenate(parts, out=out[:used])
            out[used:] = 0
        return cls(data, tuple(fields), tokens, batch.slots.shape[0], store)

    def own(self) -> PackedRow:
        """Return the row in memory of its own, for as long as it is wanted."""
        if self.lent is None:
            return self
        return dataclasses.replace(self, data=self.data.clone(), lent=None)

    @property
    def batch(self) -> Batch:
        """Return the batch on the CPU with empty ``aux`` and ``last``."""
        return self._batch(self._views(self.data))

    @property
    def counted(self) -> Tensor:
        """As of ``batch``, without its other views: the loop asks for it in every step."""
        return self.host("counted")

    @property
    def label_ids(self) -> Tensor:
        """As of ``batch``."""
        return self.host("input_ids")[self.host("label_index")]

    def host(self, name: str) -> Tensor:
        """Return one array of ``batch`` on the CPU."""
        return self._field(f"batch.{name}").of(self.data)

    def place(
        self,
        cache: Stores,
        device: torch.device,
        dtype: torch.dtype,
        layers: Sequence[int] | None = None,
    ) -> Batch:
        """The batch on ``device``: the buffer is moved, the codes are decoded there to ``dtype``.
        ``layers``: those of the store's that the draft reads (outputs of layers), in the order of
        the aux axis; None for all.
        """
        views = self._views(self.data.to(device, non_blocking=True))
        if self.lent is not None:
            self.lent.sent(device)
        hidden = cache.manifest.target.hidden_size

        codes = {n.removeprefix(CODES): t for n, t in views.items() if n.startswith(CODES)}
        batch = self._batch(views)
        tokens = None
        codec = cache.stores[self.store].codec
        if codec.needs_tokens:
            start, stored = (views[KNOWN + name] for name in ("sample_start", "last_token"))
            tokens = Tokens(batch.input_ids, start, stored, cache.embedding_on(device))
        aux, last = codec.decode(codes, hidden, tokens, dtype)
        at = None if layers is None else columns(cache.manifest.layers, layers)
        return dataclasses.replace(batch, aux=aux if at is None else aux[:, at], last=last)

    def _views(self, data: Tensor) -> dict[str, Tensor]:
        of_dtype = {dtype: data.view(dtype) for dtype in {field.dtype for field in self.fields}}
        return {field.name: field.within(of_dtype[field.dtype]) for field in self.fields}

    def _field(self, name: str) -> Field:
        return next(field for field in self.fields if field.name == name)

    def _batch(self, views: Mapping[str, Tensor]) -> Batch:
        moved = {name: views[f"batch.{name}"] for name in ARRAYS}
        tables: list[dict[str, Tensor]] = []
        for name, view in views.items():
            if name.startswith(MASK):
                at, _, which = name.removeprefix(MASK).partition(".")
                tables += [{}] * (int(at) == len(tables))
                tables[int(at)][which] = view
        # A copy: a view would keep the whole row's page-locked memory as long as the batch lives.
        held = self.host("target_at").clone()
        return Batch(**moved, target_at_host=held, tables=tuple(tables))


@lru_cache(maxsize=256)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def tokens_on_host(samples: Sequence[CodedSample]) -> dict[str, Array]:
    """``sample_start`` int64 [N + 1] and ``last_token`` int64 [M] (``base.Tokens``): found here,
    because the device would be waited for.
    """
    start = np.cumsum([0, *(len(s.tokens.input_ids) for s in samples)], dtype=np.int64)
    stored = np.concatenate([last_rows(s.tokens.loss_mask) for s in samples])
    return {"sample_start": start, "last_token": np.flatnonzero(stored).astype(np.int64)}


def columns(stored: Sequence[int], wanted: Sequence[int]) -> list[int] | None:
    """Where in the aux axis of a store with layers ``stored`` the ``wanted`` ones are; None if they
    are all of them, in this order.
    """
    if list(stored) == list(wanted):
        return None
    if missing := [i for i in wanted if i not in stored]:
        raise MismatchError(
            f"the draft reads layers {missing}, but the store has {list(stored)} (outputs "
            "of layers)"
        )
    return [list(stored).index(i) for i in wanted]


def blank(
    tokens: int,
    anchors: int,
    block_size: int,
    layers: int,
    hidden: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Batch:
    """A batch of padding alone, in which no slot counts: what a rank without a row of its own sends
    through a sharded model.
    """
    empty = Batch.build(
        input_ids=np.zeros(tokens, np.int64),
        loss_mask=np.zeros(tokens, np.bool_),
        doc=np.full(tokens, -1, np.int32),
        aux=torch.zeros(tokens, layers, hidden),
        last=torch.zeros(0, hidden),
        anchors=np.zeros(0, np.int64),
        block_size=block_size,
        pad_anchors_to=anchors,
    )
    return empty.to(device, dtype)
