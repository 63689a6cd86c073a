"""The stream: turns a store into a fixed sequence of packed rows per epoch, read by worker
processes.

Everything random is a pure function of (seed, epoch, sample): the order of samples, how they pack
into rows, and which anchors are drawn.
So the sequence is the same on any number of ranks and workers, and after any resume; a position in
it is just (epoch, step).

With several stores, each has its number of passes per epoch: with 0.3, an epoch takes three tenths
of its samples, the next epoch others, until all have been used. A row holds samples of one store,
since stores may use different codecs; the rows of all stores are then shuffled.

Legend: S tokens of a row (``total_seq_len`` at most), A anchors, N samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch

from dspark.cache.errors import TrainError, UsageError
from dspark.cache.files.place import in_parallel
from dspark.cache.joined import Stores
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch, MakeTables
from dspark.train.data.need import Need, largest_row
from dspark.train.data.readers import read_ahead
from dspark.train.data.row import PackedRow
from dspark.train.data.slots import Room

# the "epoch" whose anchors are drawn for validation: the same ones every time
VALIDATION_EPOCH = -1


def rng(seed: int, *stream: int) -> np.random.Generator:
    """Return an independent generator for each (seed, stream ...); negative numbers are allowed."""
    return np.random.Generator(
        np.random.Philox(
            np.random.SeedSequence([seed & 0xFFFFFFFF, *(s & 0xFFFFFFFF for s in stream)])
        )
    )


def split(
    keys: np.ndarray[Any, np.dtype[np.uint8]], val_fraction: float
) -> tuple[rules.Int64, rules.Int64]:
    """Split into (train, validation) sample indices by prompt hash ``keys`` uint8[N, 16]; equal
    prompts stay on one side.
    """
    share = np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype(np.float64) / 2.0**64
    held_out = share < val_fraction
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class Packed(Sequence[list[int]]):
    """Rows of sample indices, as two arrays: row ``i`` holds ``samples[starts[i]:starts[i + 1]]``.
    As lists, the rows of a million samples would take a second to make, and as long in every
    reader.
    """

    def __init__(self, samples: rules.Int64, starts: rules.Int64) -> None:
        self.samples, self.starts = samples, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, i: int) -> list[int]: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[list[int]]: ...
    def __getitem__(self, i: int | slice) -> list[int] | Sequence[list[int]]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        row: list[int] = self.samples[self.starts[i] : self.starts[i + 1]].tolist()
        return row

    @property
    def taken(self) -> rules.Int64:
        """All samples in the rows, row after row."""
        return self.samples[: self.starts[-1]]

    def first(self, rows: int | None) -> Packed:
        """Return the first ``rows`` rows; all for None."""
        return self if rows is None else Packed(self.samples, self.starts[: rows + 1])

    def ordered(self, order: rules.Int64) -> Packed:
        """Return the rows in ``order``."""
        sizes = np.diff(self.starts)[order]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        return Packed(self.samples[np.repeat(self.starts[order], sizes) + within], starts)

    @classmethod
    def joined(cls, parts: Sequence[Packed]) -> Packed:
        """Return the rows of all, one after another."""
        samples = np.concatenate([p.taken for p in parts])
        sizes = np.concatenate([np.diff(p.starts) for p in parts])
        return cls(samples, np.concatenate([[0], np.cumsum(sizes)]))


def pack(order: Sequence[int] | rules.Int64, lengths: rules.Int64, total_seq_len: int) -> Packed:
    """Pack samples in ``order`` into rows of at most ``total_seq_len`` tokens. Next-fit, so a row
    holds neighbours in the order.
    """
    samples = np.asarray(order, np.int64)
    own = lengths[samples]
    if (own > total_seq_len).any():
        i = samples[int(np.argmax(own > total_seq_len))]
        raise UsageError(
            f"sample {i} has {lengths[i]} tokens, more than --total-seq-len {total_seq_len}; "
            f"raise it to at least {lengths[i]}"
        )
    # For every sample: the first one that no longer fits into a row beginning with it.
    ends = np.cumsum(own)
    after = np.searchsorted(ends, ends - own + total_seq_len, side="right").tolist()
    starts, at = [0], 0
    while at < len(after):
        at = after[at]
        starts.append(at)
    return Packed(samples, np.array(starts, np.int64))


class Rows:
    """``read((epoch, i))`` reads, checks and assembles row i of an epoch. Runs in worker processes,
    each with its own plan.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def read(self, at: tuple[int, int], room: Room) -> PackedRow:
        epoch, i = at
        stream = self.stream
        members = stream.plan(epoch)[i]
        read = stream.cache.read
        samples = in_parallel(read, members) if stream.cache.remote else [read(s) for s in members]
        sizes = [s.tokens.input_ids.shape[0] for s in samples]
        used = sum(sizes)
        size = stream.total_seq_len if stream.pad else used
        ids = np.zeros(size, np.int64)
        mask = np.zeros(size, np.bool_)
        doc = np.full(size, -1, np.int32)
        priority = np.zeros(size, np.float64)
        ids[:used] = np.concatenate([s.tokens.input_ids for s in samples])
        mask[:used] = np.concatenate([s.tokens.loss_mask for s in samples])
        doc[:used] = np.repeat(np.arange(len(samples), dtype=np.int32), sizes)
        # Priorities belong to the sample, not to the row: independent uniforms, so a row's highest
        # A are a uniform draw.
        store = stream.cache.of(members[0])
        # If an epoch takes a sample twice, each time has its own anchors.
        again = () if stream.passes[store] == 1 else (i,)
        draws = [
            rng(stream.seed, 2, epoch, s, *again).random(n)
            for s, n in zip(members, sizes, strict=True)
        ]
        priority[:used] = np.concatenate(draws)
        candidates = rules.eligible(mask, doc)
        stored = int(candidates.sum())
        batch = Batch.build(
            input_ids=ids,
            loss_mask=mask,
            doc=doc,
            aux=torch.empty(size, 0),
            last=torch.empty(stored, 0),
            anchors=rules.choose(candidates, priority, stream.max_anchors),
            block_size=stream.block_size,
            pad_anchors_to=stream.max_anchors if stream.pad else 0,
            draw=0
            if epoch == VALIDATION_EPOCH
            else int(rng(stream.seed, 3, epoch, i).integers(1 << 31)),
        )
        if stream.tables is not None:
            tables = stream.tables(batch.doc, batch.anchors, batch.anchor_valid)
            batch = replace(batch, tables=tables)
        return PackedRow.build(batch, samples, used, store, room)


class Stream:
    """Rows of a set of samples, epoch after epoch, divided into optimizer steps of
    ``rows_per_step`` rows over all ranks.
    """

    def __init__(
        self,
        cache: Stores,
        samples: rules.Int64,
        *,
        seed: int,
        total_seq_len: int,
        rows_per_step: int,
        block_size: int,
        max_anchors: int,
        pad: bool = False,
        max_rows: int | None = None,
        passes: Sequence[float] = (1.0,),
        tables: MakeTables | None = None,
    ) -> None:
        """``passes``: per store and epoch. ``pad`` gives every row ``total_seq_len`` tokens and
        ``max_anchors`` anchors; ``max_rows`` cuts each epoch short. ``tables`` makes those of the
        attention's mask beside each row.
        """
        if samples.size == 0:
            raise TrainError(
                f"{cache.path}: no samples remain (of {len(cache)}); adjust --val-fraction or "
                "dump more rows"
            )
        self.cache, self.samples, self.seed, self.total_seq_len = (
            cache,
            samples,
            seed,
            total_seq_len,
        )
        self.rows_per_step, self.block_size, self.max_anchors = (
            rows_per_step,
            block_size,
            max_anchors,
        )
        self.pad, self.max_rows, self.passes = pad, max_rows, tuple(passes)
        self.tables = tables
        self._planned: tuple[int, Packed] | None = None

    def plan(self, epoch: int) -> Packed:
        """Return the rows of ``epoch`` as sample indices. Validation keeps the stored order."""
        if self._planned and self._planned[0] == epoch:
            return self._planned[1]
        lengths, store_of = (
            self.cache.lengths,
            np.searchsorted(self.cache.starts, self.samples, side="right") - 1,
        )
        by_store = [
            pack(self._order(epoch, s, self.samples[store_of == s]), lengths, self.total_seq_len)
            for s in range(len(self.cache.stores))
        ]
        rows = by_store[0] if len(by_store) == 1 else self._mixed(epoch, by_store)
        rows = rows.first(self.max_rows)
        self._planned = (epoch, rows)
        return rows

    def _order(self, epoch: int, store: int, samples: rules.Int64) -> rules.Int64:
        """Return the samples of a store that an epoch takes: a stretch of its concatenated
        permutations.
        """
        if epoch == VALIDATION_EPOCH or not samples.size:
            return samples
        begin, end = (round(e * self.passes[store] * samples.size) for e in (epoch, epoch + 1))
        # a single store keeps the order it had in earlier releases
        which = (store,) if store else ()
        cycles = range(begin // samples.size, -(-end // samples.size))
        orders = [rng(self.seed, 1, cycle, *which).permutation(samples) for cycle in cycles]
        first = cycles.start * samples.size
        whole: rules.Int64 = np.concatenate([samples[:0], *orders])
        return whole[begin - first : end - first]

    def _mixed(self, epoch: int, by_store: list[Packed]) -> Packed:
        """Return the rows of all stores, shuffled; for validation, each store's rows are spread
        evenly, so that the first few come from all stores.
        """
        rows = Packed.joined(by_store)
        if epoch == VALIDATION_EPOCH:
            place = np.concatenate(
                [(np.arange(len(rows)) + 0.5) / max(len(rows), 1) for rows in by_store]
            )
            return rows.ordered(np.argsort(place, kind="stable"))
        return rows.ordered(rng(self.seed, 4, epoch).permutation(len(rows)))

    def steps(self, epoch: int) -> int:
        return -(-len(self.plan(epoch)) // self.rows_per_step)

    def schedule(
        self, epoch: int, first_step: int, rank: int, world: int, endless: bool
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield, for each step from (epoch, first_step) on, this rank's (epoch, row) pairs,
        possibly none in an epoch's last step.
        """
        while True:
            rows = len(self.plan(epoch))
            for at in range(first_step * self.rows_per_step, rows, self.rows_per_step):
                step = range(at, min(at + self.rows_per_step, rows))
                yield [(epoch, i) for i in step if (i - at) % world == rank]
            if not endless:
                return
            epoch, first_step = epoch + 1, 0

    def need(self, epoch: int, world: int = 1) -> Need:
        """Return the host memory of rows that are read ahead, as large as the largest of ``epoch``.
        The loop has a step's rows while it gets those of the next.
        """
        rows = self.plan(epoch)
        row = largest_row(
            self.cache,
            rows.taken,
            rows.starts,
            block_size=self.block_size,
            anchors=self.max_anchors,
            pad_to=self.total_seq_len if self.pad else 0,
        )
        return Need(row, held=2 * -(-self.rows_per_step // world) + 1)

    def steps_from(
        self,
        epoch: int,
        first_step: int = 0,
        *,
        workers: int = 0,
        pin: bool = False,
        rank: int = 0,
        world: int = 1,
        endless: bool = False,
    ) -> Iterator[list[PackedRow]]:
        """Return the rows of each step, read ahead by ``workers`` processes that start with this
        call and live as long as the iterator (across epochs).
        """
        shape = (epoch, first_step, rank, world, endless)
        need = self.need(epoch, world) if workers or pin else None
        rows = read_ahead(Rows(self), _Flat(self, shape), workers=workers, pin=pin, need=need)
        planned = Stream.schedule(_copy_of(self), *shape)
        return ([next(rows) for _ in step] for step in planned)


@dataclass(frozen=True, slots=True)
class _Flat:
    """The reading order: the rows of ``Stream.schedule`` one by one."""

    stream: Stream
    shape: tuple[int, int, int, int, bool]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (at for step in _copy_of(self.stream).schedule(*self.shape) for at in step)


def _copy_of(stream: Stream) -> Stream:
    """Copy a stream with its own cached plan: readers run ahead into the next epoch while the loop
    is still in this one.
    """
    return copy.copy(stream)
