"""Reading processes: their errors keep their words, and one that is gone is reported where the next
row is asked for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing import popen_spawn_posix
from typing import Any

import pytest
from reader_rows import Many, Numbers

from dspark.cache import errors
from dspark.train.data import readers
from dspark.train.data.readers import read_ahead


def numbers(epoch: int, workers: int = 1, count: int = 4) -> Any:
    return read_ahead(Numbers(), [(epoch, i) for i in range(count)], workers=workers, pin=False)


def kill_the_reader() -> int:
    (reader,) = multiprocessing.active_children()
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGKILL)
    return reader.pid


def test_rows_come_in_their_order() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    rows = numbers(0, workers=2)
    assert next(rows) == 0
    assert signal.getsignal(signal.SIGCHLD) == before
    assert list(rows) == [1, 2, 3]
    assert list(numbers(0, workers=0)) == [0, 1, 2, 3]


def test_no_reader_waits_for_the_imports_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is started with must fit into the pipe, which it reads after its imports."""
    dump, sizes = popen_spawn_posix.reduction.dump, []

    def measured(thing: Any, file: Any) -> None:
        dump(thing, file)
        sizes.append(file.tell())

    monkeypatch.setattr(popen_spawn_posix.reduction, "dump", measured)
    rows = read_ahead(Many(), [(0, 7), (0, 99_999)], workers=2, pin=False)
    assert list(rows) == [7, 99_999]
    assert len(sizes) == 4  # of each what it is to import, then itself
    assert max(sizes) < 1 << 15


def test_a_reader_that_is_killed_is_reported_with_the_next_row_and_not_before() -> None:
    rows = numbers(0, count=100)
    assert next(rows) == 0
    pid = kill_the_reader()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:  # where torch's own handler would raise, amid a step
        pass
    with pytest.raises(
        errors.TrainError,
        match=rf"pid {pid}, of 1\) was killed by SIGKILL .out of memory.*--workers.*--resume",
    ):
        next(rows)


def test_a_reader_that_is_killed_while_it_is_waited_for() -> None:
    rows = numbers(1)
    assert [next(rows), next(rows)] == [0, 1]
    kill_the_reader()
    with pytest.raises(errors.TrainError, match="killed by SIGKILL"):
        next(rows)


def test_a_reader_whose_end_is_known_a_moment_after_its_sentinel() -> None:
    """As seen in one of three kills: the pipe is closed, the process not yet reaped."""

    class Dying:
        pid, exitcode = 99, None

        def __init__(self) -> None:
            self.sentinel, other = os.pipe()
            os.close(other)

        def join(self, timeout: float) -> None:
            self.exitcode = -signal.SIGKILL

    reader: Any = Dying()
    readers._all_there([reader])
    readers._settle([reader])
    with pytest.raises(errors.TrainError, match="killed by SIGKILL"):
        readers._all_there([reader])
    os.close(reader.sentinel)


def test_a_reader_that_ends_by_itself() -> None:
    with pytest.raises(errors.TrainError, match="ended with exit code 7"):
        list(numbers(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_row_keeps_its_type_and_words(workers: int) -> None:
    rows = numbers(2, workers)
    assert [next(rows), next(rows)] == [0, 1]
    with pytest.raises(errors.DamagedCacheError) as raised:
        next(rows)
    assert str(raised.value) == "part 3 is damaged"
