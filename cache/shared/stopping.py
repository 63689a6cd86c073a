"""How a command stops when it is asked to: SIGTERM, SIGINT (Ctrl-C) or SIGHUP (a closed ssh).

The first signal immediately prints one line that says what happens now, and the work ends at its
next safe point. A second signal ends the process on the spot. A separate thread writes the line:
the main thread may be inside a call that takes minutes, and Python runs handlers only between two
of its steps.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from dspark.cache.errors import Stopped
from dspark.cache.files.urls import Url, Where

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN = "A second signal stops at once."


_entered: list[Stopping] = []


def _forget() -> None:
    """Detach a forked child: a signal to the whole group must not count twice in the parent,
    through the pipe that both share.
    """
    if _entered:
        signal.set_wakeup_fd(-1)
        for number, handler in _entered[0]._old.items():
            signal.signal(number, handler)
        _entered.clear()


os.register_at_fork(after_in_child=_forget)


def asked() -> bool:
    """Tell whether what runs here was asked to stop."""
    return any(one.asked for one in _entered)


def leave_to_parent() -> None:
    """Ignore the signals that stop a command, which reach the whole group, in a process that ends
    when its parent does.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """End this process as soon as its parent does, however that ends; in a process that
    ``multiprocessing`` started.
    """
    import multiprocessing
    from multiprocessing import connection

    parent = multiprocessing.parent_process()
    assert parent is not None
    if not parent.is_alive():  # ended while this process started
        os._exit(1)

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Stopping:
    """While active, signals set ``asked``; with ``raises``, the first one also raises
    KeyboardInterrupt in the main thread.

    ``doing``: what happens after the first signal, in words. ``safe``: says what is on disk, for
    the second. ``alone``: a second one ends the process (under torchrun each process gets a signal
    twice, from the terminal and from the launcher, which kills what does not end in 30 s).
    ``speaks``: whether this process prints. A signal that was ignored before (nohup) stays ignored.
    """

    def __init__(
        self,
        doing: Callable[[], str],
        safe: Callable[[], str],
        *,
        raises: bool = True,
        alone: bool = True,
        speaks: bool = True,
    ) -> None:
        self.asked = False
        self._doing, self._safe = doing, safe
        self._raises, self._alone, self._speaks = raises, alone, speaks
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._outer = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="dspark-stopping", daemon=True)
        self._thread.start()
        _entered.append(self)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self not in _entered:
            return
        _entered.remove(self)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._outer)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        if first and self._raises:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        count = 0
        while received := os.read(self._read, 64):
            for number in received:
                if number not in self._old:
                    continue
                count += 1
                if count == 1:
                    self._answer(number)
                elif self._alone:
                    self._end(number)

    def _answer(self, number: int) -> None:
        again = f" {AGAIN}" if self._alone else ""
        if self._speaks:
            _tell(f"{signal.Signals(number).name}: {self._doing()}.{again}")
        if number == signal.SIGHUP:
            _leave_terminal()

    def _end(self, number: int) -> None:
        if self._speaks:
            _tell(f"{signal.Signals(number).name}: stopped at once. {self._safe()}")
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(128 + number)


def _tell(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _leave_terminal() -> None:
    """Keep further output from failing when the terminal, or the reader of our pipe, is gone."""
    for number in (1, 2):
        try:
            poll = select.poll()
            poll.register(number, 0)
            gone = os.isatty(number) or any(
                flags & (select.POLLERR | select.POLLHUP) for _, flags in poll.poll(0)
            )
        except OSError:
            gone = True
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


@contextmanager
def stoppable(doing: str, safe: Callable[[], str]) -> Iterator[Stopping]:
    """Run a block that a signal interrupts; it then ends with Stopped, whose message says what is
    ``safe``.
    """
    with Stopping(lambda: doing, safe) as stop:
        try:
            yield stop
        except KeyboardInterrupt as error:
            raise Stopped(f"stopped. {safe()}") from error


def parts_of(output: Where, *, resume: bool = True) -> Callable[[], str]:
    """Say what is safe in the store that a command writes at ``output``. Call it before the command
    starts, because an older store may be there. An object store is not queried: a command that is
    stopped does not wait for a service.
    """
    if isinstance(output, Url):
        said = f"Finished parts in {output} are safe. Rerun the same command with --resume."
        return lambda: said
    before = _identity(output)

    def safe() -> str:
        now = _identity(output)
        if now is None:
            return "Nothing was written."
        if now == before and not resume:
            return f"The store at {output} is unchanged."
        done = (
            sum(1 for p in (output / "parts").glob("[0-9]*")) if (output / "parts").is_dir() else 0
        )
        if not done:
            return (
                f"No part was finished; rerun the same command with --resume to continue {output}."
            )
        return f"{done} finished parts in {output} are safe. Rerun the same command with --resume."

    return safe


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
