"""Processes that read rows ahead of the loop, and the errors raised when one of them fails or dies.

Each has a pipe of its own and reads the rows that it is asked for one after another, always a few
ahead; the loop takes them in turn. The loss of a reader is raised only when the next row is
requested, where all ranks learn of it together (``step.share``): elsewhere the loop may be in a
backward pass whose sums the other ranks wait for, or writing a checkpoint.

Rows are written to slots (``slots.py``), which go to the readers with what is to be read. So a
message is small, and the loop's thread, which also launches the GPU's work, spends 0.43 ms on a row
on a CPU. With torch's loader it was 0.62: that asks through a thread of each reader's own, and
these take turns with the loop's (docs/log/2026-11-27-pipes-to-readers.md).
"""

from __future__ import annotations

import logging
import pickle
import select
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dspark.cache.errors import DsparkError, TrainError
from dspark.cache.shared.blocks import Handle, Region, SharedBlock, can_share, mapped
from dspark.cache.shared.spawned import Spawning
from dspark.cache.shared.stopping import asked
from dspark.train.data.need import AHEAD, Need
from dspark.train.data.row import Field, PackedRow
from dspark.train.data.slots import Desk, Offer, Room, Slots

log = logging.getLogger("dspark.train")
SILENT = 60  # seconds without the row that is waited for, after which that is said
GRACE = 2.0  # seconds in which a reader that was killed, or whose connection broke, is gone
LIKELY = {"SIGKILL": " (out of memory?)", "SIGBUS": " (out of memory, or is /dev/shm full?)"}

At = tuple[int, int]


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


class Failed(NamedTuple):
    """A reader failed in a way that is nobody's but ours to mend; ``trace``: its own."""

    trace: str


Found = PackedRow | Written | DsparkError | Failed
Wanted = tuple[At, Offer | None]


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
    wanted = ((at, slots.lend() if slots else None) for at in order)
    if not workers:
        desk = Desk()
        return _taken((_read(rows, desk, *one) for one in wanted), slots)
    try:
        readers = _Readers(rows, wanted, workers)
    except OSError as error:
        raise TrainError(
            f"{workers} processes that read the store could not be started ({error}). Use fewer "
            "--workers (0 for none), or raise the limits on open files and processes (ulimit -n, "
            "-u)."
        ) from error
    return _taken(iter(readers.next, None), slots, readers)


def _taken(
    found: Iterator[Found], slots: Slots | None, readers: _Readers | None = None
) -> Iterator[PackedRow]:
    try:
        # Without a name: it would keep the row, and so its slot, until the next has come.
        yield from map(partial(_row, slots), found)
    finally:
        if readers is not None:
            readers.close()
        if slots is not None:
            slots.close()


def _row(slots: Slots | None, found: Found) -> PackedRow:
    """Raises what came instead of a row."""
    if isinstance(found, DsparkError):
        raise found
    if isinstance(found, Failed):
        raise RuntimeError(f"a process that reads the store failed:\n{found.trace}")
    if isinstance(found, PackedRow):
        return found
    assert slots is not None
    data, lent = slots.taken(found.number, found.size, found.used)
    return PackedRow(data, found.fields, found.tokens, found.slots, found.store, lent)


class _Readers:
    """``count`` processes that read ``wanted`` rows in turn, each with a pipe. They end with
    ``close``, when nothing refers to this any more, or with this process.
    """

    def __init__(self, rows: Rows, wanted: Iterator[Wanted], count: int) -> None:
        """Raises OSError if the system starts none."""
        self._wanted = wanted
        self._coming: deque[int] = deque()  # whose row is next, and after that
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        # In shared memory: what a process is started with goes through a pipe that holds 64 KB and
        # that the child reads only after its imports, and the next child waits for that. With the
        # order of some thousand samples, seconds per reader.
        given = SharedBlock(can_share(), name="dspark-order")
        # Before ``multiprocessing`` waits for its processes at the exit, and not in a fork of ours.
        self.close = Finalize(self, _end, (self._processes, self._pipes, given), exitpriority=0)
        context = Spawning()
        try:
            packed = _hold(given, pickle.dumps(rows))
            for _ in range(count):
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                process = context.Process(target=_serve, args=(theirs, packed), daemon=True)
                with closing(theirs):
                    process.start()
                self._processes.append(process)
            self._ready = [select.poll() for _ in self._pipes]
            for ready, pipe in zip(self._ready, self._pipes, strict=True):
                ready.register(pipe, select.POLLIN)
            # One question for all of them, where their exit codes are a system call each.
            self._ended = select.poll()
            for one in self._processes:
                self._ended.register(one.sentinel, select.POLLIN)
            for number in AHEAD * list(range(count)):
                self._ask(number)
        except BaseException:
            self.close()
            raise

    def next(self) -> Found | None:
        """Wait for the next row; None after the last. Raises TrainError if a reader has ended
        before.
        """
        if not self._coming:
            return None
        if self._ended.poll(0):
            _all_there(self._processes)
        number = self._coming.popleft()
        self._wait(number)
        try:
            found: Found = self._pipes[number].recv()
        except (EOFError, OSError):
            _settle(self._processes)
            _all_there(self._processes)
            raise
        self._ask(number)
        return found

    def _wait(self, number: int) -> None:
        """Wait until a reader has sent something, or has ended. Raises TrainError if the training
        is asked to stop meanwhile: it stands between two steps, and whoever took the row would
        learn that next. A thread that reads beside it goes on, since a validation wants its rows.
        """
        seconds = 0
        while not self._ready[number].poll(1000):
            seconds += 1
            if asked() and threading.current_thread() is threading.main_thread():
                raise TrainError("asked to stop while a row was waited for")
            if seconds % SILENT == 0:
                log.warning(
                    "no row for %d s: the process that is to read it (pid %d) has not ended; look "
                    "at what it reads from, and whether it stands still",
                    seconds,
                    self._processes[number].pid,
                )

    def _ask(self, number: int) -> None:
        one = next(self._wanted, None)
        if one is None:
            return
        self._coming.append(number)
        with suppress(ConnectionError):  # it is gone, which ``next`` finds out
            self._pipes[number].send_bytes(pickle.dumps(one))  # what ``send`` does, in C


def _hold(block: SharedBlock, data: bytes) -> Handle | bytes:
    """Copy ``data`` to ``block``; returns what a process finds it by, or ``data`` itself where no
    memory can be shared.
    """
    if not can_share():
        return data
    block.reserve(len(data), slack=False)
    block.array(Region(0, (len(data),), "uint8"))[:] = np.frombuffer(data, np.uint8)
    return block.handle()


def _end(processes: list[BaseProcess], pipes: list[Connection], given: SharedBlock) -> None:
    """End the readers at once, also one that imports, waits for a service or stands still: nothing
    depends on what it is at.
    """
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.kill()
    for process in processes:
        process.join(GRACE)
    given.close()


def _serve(pipe: Connection, packed: Handle | bytes) -> None:
    """All that a reader does: read what it is asked for, until its pipe is closed."""
    torch.set_num_threads(1)
    rows: Rows = pickle.loads(packed if isinstance(packed, bytes) else mapped(packed).data)
    desk = Desk()
    with suppress(EOFError, ConnectionError):
        while True:
            at, offer = pipe.recv()
            found: Found
            try:
                found = _read(rows, desk, at, offer)
            except Exception:
                found = Failed(traceback.format_exc())
            pipe.send(found)


def _read(rows: Rows, desk: Desk, at: At, offer: Offer | None) -> Found:
    room = Room(desk, offer)
    try:
        row = rows.read(at, room)
    except DsparkError as error:
        return error
    if offer is None:
        return row
    used = row.data.shape[0]
    return Written(offer.number, room.size, used, row.fields, row.tokens, row.slots, row.store)


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
            how = (
                f"ended with exit code {code} (what it printed is above; a script of yours that "
                'trains must do so under `if __name__ == "__main__":`, as each reader imports it)'
            )
        raise TrainError(
            f"a process that reads the store (pid {reader.pid}, of {len(readers)}) {how}; "
            "expected it to run as long as the training. "
            "Use fewer --workers (0 for none), and rerun the same command with --resume to "
            "continue from the last checkpoint."
        )
