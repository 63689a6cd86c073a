"""Worker processes of a dump: how many, and how they start and end."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from dspark.cache.errors import EngineError, UsageError, first_line
from dspark.cache.shared.host_cores import cores
from dspark.cache.shared.spawned import Spawning

P = ParamSpec("P")
T = TypeVar("T")


def default_workers(device: str) -> int:
    """Return the worker processes per stage: with a GPU a quarter of the cores, at most 8; none on
    a CPU, where the target needs the cores.
    """
    return max(1, min(8, cores() // 4)) if device == "cuda" else 0


def pickled(value: object, task: str) -> bytes:
    """Return ``value`` as bytes for a process that does ``task``. Raises UsageError for a tokenizer
    that its own code keeps from being sent.
    """
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as error:
        raise UsageError(
            f"what a process that {task} works with cannot be sent to it: {first_line(error)}. "
            "A tokenizer with code of its own may be the cause: use --workers 0, which starts "
            "no processes."
        ) from error


class WorkerPool(ProcessPoolExecutor):
    """Fresh processes that leave signals to the parent and end with it, however it ends; all start
    at once. ``task``: what they do, for messages. ``start(*arguments)`` runs first in each of them.
    ``workers``: what --workers is, where the pool is not of so many. If one is killed, the others
    end too, and every unfinished or later task raises ``EngineError``.
    """

    def __init__(
        self,
        processes: int,
        task: str,
        start: Callable[..., None] | None = None,
        arguments: tuple[Any, ...] = (),
        workers: int | None = None,
    ) -> None:
        context = Spawning()
        self.processes, self.task = processes, task
        self._given_out: set[Future[Any]] = set()  # and not done
        self._workers = processes if workers is None else workers
        # Passed by file: arguments of a process go through a pipe that the child reads only after
        # importing what they need, and the next child waits for that (seconds each, with a
        # tokenizer).
        with tempfile.NamedTemporaryFile(prefix="dspark-", suffix=".pickle", delete=False) as given:
            self._given = Path(given.name)
            try:
                given.write(pickled((start, arguments), task))
                given.flush()
                # The executor starts a process only if none is idle, and none is idle until all
                # have started.
                meet = context.Barrier(processes)
                initargs = (meet, given.name)
                super().__init__(
                    processes, mp_context=context, initializer=_begin, initargs=initargs
                )
                self._first = [self.submit(os.getpid) for _ in range(processes)]
            except BaseException:  # Ctrl-C too: nobody else knows of the file
                self._given.unlink(missing_ok=True)
                raise

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            inner = super().submit(fn, *args, **kwargs)
        except BrokenProcessPool as error:
            raise self._killed() from error
        out: Future[T] = Future()
        self._given_out.add(out)
        out.add_done_callback(self._given_out.discard)
        inner.add_done_callback(lambda done: self._hand_on(done, out))
        return out

    def _hand_on(self, done: Future[T], out: Future[T]) -> None:
        if done.cancelled():
            out.cancel()
            return
        if not out.set_running_or_notify_cancel():  # closed meanwhile
            return
        error = done.exception()
        if error is None:
            out.set_result(done.result())
        elif isinstance(error, BrokenProcessPool):
            killed = self._killed()
            killed.__cause__ = error
            out.set_exception(killed)
        else:
            out.set_exception(error)

    def _killed(self) -> EngineError:
        return EngineError(
            f"a process that {self.task} ended early (one of {self.processes}, see "
            f"--workers {self._workers}): it crashed, or the kernel killed it because memory ran "
            "out (see dmesg). Finished parts are kept. Rerun the same command with --resume, with "
            f"more memory or fewer --workers than {self._workers} (0 = none)."
        )

    def wait_until_started(self) -> None:
        """Wait until all of them are ready: starting takes seconds of all cores, which must not
        count in a rate.
        """
        for task in self._first:
            task.result()
        self._given.unlink(missing_ok=True)

    def close(self) -> None:
        """Discard waiting tasks, and the results of others: whoever waits for one gets
        CancelledError now. The processes end when they have done what they are at.
        """
        self._given.unlink(missing_ok=True)
        self.shutdown(wait=False, cancel_futures=True)
        for task in list(self._given_out):
            task.cancel()


def _begin(meet: Barrier, given: str) -> None:
    try:
        start, arguments = pickle.loads(Path(given).read_bytes())
    except FileNotFoundError:
        os._exit(0)  # closed before startup finished
    if start is not None:
        start(*arguments)
    if meet.wait() == 0:
        Path(given).unlink(missing_ok=True)  # all have read it
