"""Processes that read rows ahead of the loop, and the errors raised when one of them fails or dies.

torch's loader raises as soon as a reader is gone, wherever the loop is: in a backward pass whose
sums the other ranks wait for, or while a checkpoint is written. Here the loss of a reader is raised
only when the next row is requested, where all ranks learn of it together (``step.share``). That
costs a few seconds: rows read before are still trained on, and torch looks for dead readers every 5
s of waiting.

Rows are written to slots (``slots.py``), which go to the readers with what is to be read.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dspark.cache.errors import DsparkError, TrainError
from dspark.cache.shared.blocks import can_share
from dspark.cache.shared.stopping import end_with_parent, leave_to_parent
from dspark.train.data.need import AHEAD, Need
from dspark.train.data.row import Field, PackedRow
from dspark.train.data.slots import Desk, Offer, Room, Slots

GRACE = 2.0  # seconds in which a reader whose connection broke is seen to be gone
LIKELY = {"SIGKILL": " (out of memory?)", "SIGBUS": " (out of memory, or is /dev/shm full?)"}


At = tuple[int, int]
T = TypeVar("T")


class Rows(Protocol):
    """What readers read from; it is pickled for each of them."""

    def read(self, at: At, room: Room) -> PackedRow:
        """Read row ``at`` into ``room``; raises DsparkError."""
        ...


class Written(NamedTuple):
    """A row in a slot that now has ``size`` bytes, of which the row takes ``used``; the others as
    of ``PackedRow``.
    """

    number: int
    size: int
    used: int
    fields: tuple[Field, ...]
    tokens: int
    slots: int
    store: int


def read_ahead(
    rows: Rows, order: Iterable[At], *, workers: int, pin: bool, need: Need | None = None
) -> Iterator[PackedRow]:
    """``rows.read(at)`` for each ``at`` of ``order``, by ``workers`` processes (0 = by this one)
    that start with this call and live as long as the iterator. ``pin``: into page-locked memory. It
    raises what reading raised, and TrainError if a reader died; at once UsageError if the host has
    less memory than it ``need``s, TrainError if it starts no reader.
    """
    slots = None
    if can_share() and (workers or pin):
        need = need or Need()
        slots = Slots(need.row, need.count(workers), pin)
    others = set(multiprocessing.active_children())
    try:
        with _no_alarm(), warnings.catch_warnings():
            # more than cores: as requested, or to wait for a remote store's answers
            warnings.filterwarnings("ignore", "This DataLoader will create")
            ahead = iter(
                DataLoader(
                    _Told(rows),
                    batch_size=None,
                    sampler=_Lent(order, slots),
                    collate_fn=_as_it_is,
                    num_workers=workers,
                    prefetch_factor=AHEAD if workers else None,
                    multiprocessing_context="spawn" if workers else None,
                    worker_init_fn=_begin,
                )
            )
    except OSError as error:
        raise TrainError(
            f"{workers} processes that read the store could not be started ({error}). Use fewer "
            "--workers (0 for none), or raise the limits on open files and processes (ulimit -n, "
            "-u)."
        ) from error
    readers = [process for process in multiprocessing.active_children() if process not in others]
    return _taken(ahead, readers, slots)


def _taken(
    ahead: Iterator[PackedRow | Written | DsparkError],
    readers: list[BaseProcess],
    slots: Slots | None,
) -> Iterator[PackedRow]:
    try:
        while True:
            _all_there(readers)
            try:
                found = next(ahead)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):
                _settle(readers)
                _all_there(readers)
                raise
            if isinstance(found, DsparkError):
                raise found
            # No name here: it would keep the row, and so its slot, until the next has come.
            yield found if isinstance(found, PackedRow) else _in_slot(found, slots)
            del found
    finally:
        del ahead  # ends the readers
        if slots is not None:
            slots.close()


def _in_slot(found: Written, slots: Slots | None) -> PackedRow:
    assert slots is not None
    data, lent = slots.taken(found.number, found.size, found.used)
    return PackedRow(data, found.fields, found.tokens, found.slots, found.store, lent)


@dataclass(frozen=True, slots=True)
class _Lent:
    """The order, each of its places with the slot for its row. The loader takes the next whenever
    it has a row, so that there is a slot for each of those that are being read.
    """

    order: Iterable[At]
    slots: Slots | None

    def __iter__(self) -> Iterator[tuple[At, Offer | None]]:
        return ((at, self.slots.lend() if self.slots else None) for at in self.order)


class _Told(Dataset[PackedRow | Written | DsparkError]):
    """Returns rows, or the original error of reading one: the loader would return an exception with
    its trace in the message.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._desk = Desk()
        self._packed: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Hand the rows over in shared memory. What a process is started with goes through a pipe
        that holds 64 KB and that the child reads only after its imports, and the next child waits
        for that: with the order of some thousand samples, seconds per reader.
        """
        if self._packed is None:
            packed = torch.frombuffer(bytearray(pickle.dumps(self.rows)), dtype=torch.uint8)
            self._packed = packed.share_memory_()  # type: ignore[no-untyped-call]
        return {"packed": self._packed}

    def __setstate__(self, state: dict[str, torch.Tensor]) -> None:
        self.__init__(pickle.loads(state["packed"].numpy().tobytes()))  # type: ignore[misc]

    def __getitem__(self, wanted: tuple[At, Offer | None]) -> PackedRow | Written | DsparkError:
        at, offer = wanted
        room = Room(self._desk, offer)
        try:
            row = self.rows.read(at, room)
        except DsparkError as error:
            return error
        if offer is None:
            return row
        used = row.data.shape[0]
        return Written(offer.number, room.size, used, row.fields, row.tokens, row.slots, row.store)


def _as_it_is(row: T) -> T:
    """Keep the loader from making lists of tuples."""
    return row


def _begin(worker: int) -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal: a reader that died of it would keep
    the loop from saving. End with the training, also one that was killed while this process
    started: torch only looks for another parent than there is by now.
    """
    leave_to_parent(signal.SIGINT, signal.SIGHUP)  # a loader ends its readers with SIGTERM
    end_with_parent()


@contextmanager
def _no_alarm() -> Iterator[None]:
    """Remove the SIGCHLD handler that a loader installs, because it raises anywhere. Only the main
    thread has handlers.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _settle(readers: list[BaseProcess]) -> None:
    """Wait, after a broken connection, until the process that broke it is known to be gone. A
    reader that dies closes its connections first, then the pipe that is its sentinel, and has an
    exit code a moment after that.
    """
    gone = wait([reader.sentinel for reader in readers], GRACE)
    for reader in readers:
        if reader.sentinel in gone:
            reader.join(GRACE)


def _all_there(readers: list[BaseProcess]) -> None:
    """Raise TrainError if a reader has ended: none does by itself before the last row."""
    for reader in readers:
        code = reader.exitcode
        if code is None:
            continue
        if code < 0:
            name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
            how = f"was killed by {name}{LIKELY.get(name, '')}"
        else:
            how = f"ended with exit code {code}"
        raise TrainError(
            f"a process that reads the store (pid {reader.pid}, of {len(readers)}) {how}; "
            "expected it to run as long as the training. "
            "Use fewer --workers (0 for none), and rerun the same command with --resume to "
            "continue from the last checkpoint."
        )
