"""Processes that read rows ahead of the loop, and the errors raised when one of them fails or dies.

torch's loader raises as soon as a reader is gone, wherever the loop is: in a backward pass whose
sums the other ranks wait for, or while a checkpoint is written. Here the loss of a reader is raised
only when the next row is requested, where all ranks learn of it together (``step.share``). That
costs a few seconds: rows read before are still trained on, and torch looks for dead readers every 5
s of waiting.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dspark.cache.errors import DsparkError, TrainError
from dspark.cache.shared.stopping import leave_to_parent
from dspark.train.data.row import PackedRow

AHEAD = 4  # rows that each reader has ready
GRACE = 2.0  # seconds in which a reader whose connection broke is seen to be gone
LIKELY = {"SIGKILL": " (out of memory?)", "SIGBUS": " (is /dev/shm full?)"}


def read_ahead(
    rows: Dataset[PackedRow], order: Iterable[tuple[int, int]], *, workers: int, pin: bool
) -> Iterator[PackedRow]:
    """``rows[at]`` for each ``at`` of ``order``, read by ``workers`` processes (0 = by this one)
    that start with this call and live as long as the iterator. It raises what reading raised, and
    TrainError if a reader died.
    """
    others = set(multiprocessing.active_children())
    loader = DataLoader(
        _Told(rows),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=AHEAD if workers else None,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_leave_interrupts_to_the_loop,
    )
    with _no_alarm():
        ahead = iter(loader)
    readers = [process for process in multiprocessing.active_children() if process not in others]
    return _taken(ahead, readers)


def _taken(
    ahead: Iterator[PackedRow | DsparkError], readers: list[BaseProcess]
) -> Iterator[PackedRow]:
    while True:
        _all_there(readers)
        try:
            row = next(ahead)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError):
            _settle(readers)
            _all_there(readers)
            raise
        if isinstance(row, DsparkError):
            raise row
        yield row


class _Told(Dataset[PackedRow | DsparkError]):
    """Returns rows, or the original error of reading one: the loader would return an exception with
    its trace in the message.
    """

    def __init__(self, rows: Dataset[PackedRow]) -> None:
        self.rows = rows
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

    def __getitem__(self, at: tuple[int, int]) -> PackedRow | DsparkError:
        try:
            return self.rows[at]
        except DsparkError as error:
            return error


def _leave_interrupts_to_the_loop(worker: int) -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal: a reader that died of it would keep
    the loop from saving.
    """
    leave_to_parent(signal.SIGINT, signal.SIGHUP)  # a loader ends its readers with SIGTERM


@contextmanager
def _no_alarm() -> Iterator[None]:
    """Remove the SIGCHLD handler that a loader installs, because it raises anywhere. Only the main
    thread has handlers.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    yield
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
