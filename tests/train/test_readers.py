"""Reading processes: their errors keep their words, and one that is gone is reported where the next
row is asked for.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import suppress
from multiprocessing import popen_spawn_posix
from pathlib import Path
from typing import Any

import pytest
import torch
from reader_rows import Many, Numbers
from small_trainings import small_training

from dspark.cache import errors
from dspark.cache.shared import blocks, stopping
from dspark.cache.shared.blocks import can_share
from dspark.cache.shared.spawned import SpawnedProcess
from dspark.train.data import readers
from dspark.train.data import slots as data_slots
from dspark.train.data.need import AHEAD, Need
from dspark.train.data.readers import read_ahead
from dspark.train.data.slots import Desk, Offer, Room, Slots
from dspark.train.data.stream import Stream
from dspark.train.loop import train


def numbers(epoch: int, workers: int = 1, count: int = 4) -> Iterator[int]:
    """The number in each row of ``Numbers``, the same wherever it looks."""
    order = [(epoch, i) for i in range(count)]
    for row in read_ahead(Numbers(), order, workers=workers, pin=False):
        (value,) = row.fields[0].of(row.data).unique().tolist()
        assert value == row.tokens
        yield value


def kill_the_reader() -> int:
    (reader,) = multiprocessing.active_children()
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGKILL)
    return reader.pid


def test_rows_come_in_their_order() -> None:
    assert list(numbers(0, workers=2)) == [0, 1, 2, 3]
    assert list(numbers(0, workers=0)) == [0, 1, 2, 3]


def test_no_reader_waits_for_the_imports_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is started with must fit into the pipe, which it reads after its imports."""
    dump, sizes = popen_spawn_posix.reduction.dump, []

    def measured(thing: Any, file: Any) -> None:
        dump(thing, file)
        sizes.append(file.tell())

    monkeypatch.setattr(popen_spawn_posix.reduction, "dump", measured)
    rows = read_ahead(Many(), [(0, 7), (0, 99_999)], workers=2, pin=False)
    assert [row.tokens for row in rows] == [7, 99_999]
    assert len(sizes) == 4  # of each what it is to import, then itself
    assert max(sizes) < 1 << 15


def test_a_reader_that_is_killed_is_reported_with_the_next_row_and_not_before() -> None:
    rows = numbers(0, count=100)
    assert next(rows) == 0
    pid = kill_the_reader()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:  # nothing may be raised amid a step
        pass
    with pytest.raises(
        errors.TrainError,
        match=rf"pid {pid}, of 1\) was killed by SIGKILL .out of memory.*--workers.*--resume",
    ):
        next(rows)


def test_a_reader_that_is_killed_after_its_last_row() -> None:
    rows = numbers(0, count=2)
    assert [next(rows), next(rows)] == [0, 1]
    (reader,) = multiprocessing.active_children()
    kill_the_reader()
    reader.join()
    assert list(rows) == []


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_to_the_group_does_not_end_readers(number: signal.Signals) -> None:
    """While they start, or later: the training may need their rows for what it does then."""
    rows = read_ahead(Numbers(), [(0, i) for i in range(50)], workers=1, pin=False)
    (reader,) = multiprocessing.active_children()
    assert reader.pid is not None
    for i in range(50):
        os.kill(reader.pid, number)
        assert next(rows).tokens == i


def test_a_reader_that_is_killed_while_it_is_waited_for() -> None:
    rows = numbers(1)
    assert [next(rows), next(rows)] == [0, 1]
    kill_the_reader()
    with pytest.raises(errors.TrainError, match="killed by SIGKILL"):
        next(rows)


def test_readers_end_with_a_training_that_is_killed_while_they_start() -> None:
    """What they inherit, the pipe of its output, is closed once all of them are gone."""
    code = (
        "import os, signal; from reader_rows import Numbers\n"
        "from dspark.train.data.readers import read_ahead\n"
        "rows = read_ahead(Numbers(), [(0, 0)], workers=2, pin=False)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, said = process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not said


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
    with pytest.raises(errors.TrainError, match=r"exit code 7 .*above; a script.*__main__"):
        list(numbers(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_row_keeps_its_type_and_words(workers: int) -> None:
    rows = numbers(2, workers)
    assert [next(rows), next(rows)] == [0, 1]
    with pytest.raises(errors.DamagedCacheError) as raised:
        next(rows)
    assert str(raised.value) == "part 3 is damaged"


def test_an_error_that_nobody_expects_comes_with_its_trace() -> None:
    rows = numbers(5)
    assert [next(rows), next(rows)] == [0, 1]
    with pytest.raises(RuntimeError, match=r"(?s)reads the store failed.*in read.*of a bug"):
        next(rows)


@pytest.mark.parametrize("how", ["dropped", "closed", "stopped"])
def test_readers_end_with_the_rows_that_nobody_takes(how: str) -> None:
    """Not one row was asked for; and a process that stands still is ended too."""
    rows = read_ahead(Numbers(), [(1, 2), (1, 2)], workers=1, pin=False)
    (reader,) = multiprocessing.active_children()
    assert reader.pid is not None
    if how == "stopped":
        os.kill(reader.pid, signal.SIGSTOP)
    if how == "closed":
        assert isinstance(rows, Generator)
        rows.close()
    begun = time.monotonic()
    del rows
    gc.collect()
    assert not multiprocessing.active_children()
    assert time.monotonic() - begun < readers.GRACE / 2, "not one that starts is waited for"


def test_readers_do_not_end_with_a_fork_of_the_training() -> None:
    """Which has its own copy of all that refers to them, and may let go of it."""
    rows = read_ahead(Numbers(), [(0, i) for i in range(20)], workers=1, pin=False)
    assert isinstance(rows, Generator)
    first = next(rows).tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that the fork does not have
        child = os.fork()
    if not child:
        try:
            rows.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert [first, *(row.tokens for row in rows)] == list(range(20))


def test_rows_come_where_no_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory of their own; what readers read from goes through a pipe."""
    monkeypatch.setattr(readers, "can_share", lambda: False)
    order = [(0, i) for i in (7, 99_999, 3)]
    rows = list(read_ahead(Many(), order, workers=2, pin=False))
    assert [int(row.data.view(torch.int64).unique()) for row in rows] == [7, 99_999, 3]
    assert all(row.lent is None for row in rows)
    assert list(numbers(0, workers=2, count=40)) == list(range(40))


@pytest.mark.skipif(not can_share(), reason="rows come in memory of their own here")
def test_no_file_system_in_memory_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's /dev/shm may be small or not writable."""

    def refuse(self: Any) -> None:
        raise RuntimeError("unable to allocate shared memory: No space left on device")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    rows = read_ahead(Many(), [(0, 7)], workers=1, pin=False)
    assert [row.tokens for row in rows] == [7]


def test_a_row_that_does_not_come_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose reader stands still, as with a file system that is gone; it goes on when that does."""
    rows = numbers(0, count=100)
    assert next(rows) == 0
    monkeypatch.setattr(readers, "SILENT", 1)
    (reader,) = multiprocessing.active_children()
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGSTOP)
    wake = threading.Timer(2.5, os.kill, (reader.pid, signal.SIGCONT))
    wake.start()
    assert list(rows) == list(range(1, 100))
    wake.join()
    said = [m for m in caplog.messages if f"(pid {reader.pid}) has not ended" in m]
    assert [m.partition(":")[0] for m in said] == ["no row for 1 s", "no row for 2 s"]


def test_a_training_stops_that_waits_for_a_row(tmp_path: Path) -> None:
    """Whose reader stands still: asked to stop, it saves what it has."""
    asked: list[threading.Timer] = []

    def stand_still(step: int, total: int, text: str) -> None:
        if step == 2:
            (reader,) = multiprocessing.active_children()
            assert reader.pid is not None
            os.kill(reader.pid, signal.SIGSTOP)
            asked.append(threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)))
            asked[0].start()

    config = small_training(
        tmp_path, [250] * 40, workers=1, val_fraction=0.0, epochs=3, checkpoint_freq=50.0
    )
    with pytest.raises(errors.Stopped, match=r"stopped\. Step \d is saved"):
        train(config, progress=stand_still)
    assert list((tmp_path / "draft" / "checkpoints").iterdir())


def slots_of_ours() -> int:
    """Pieces of memory that this process has mapped for rows. Errors of other tests, caught with
    their frames, are cycles that may still hold some.
    """
    gc.collect()
    return Path("/proc/self/maps").read_text().count("dspark-row")


@pytest.mark.skipif(not can_share(), reason="rows come in memory of their own here")
def test_slots_are_used_again_and_a_row_that_is_held_keeps_its_own() -> None:
    """Rows here grow, so that slots are enlarged too; one is held all along."""
    slots: list[Slots] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "Slots", lambda *a: slots.append(Slots(*a)) or slots[0])
        rows = read_ahead(Numbers(), [(4, i) for i in range(60)], workers=2, pin=False)
        held = next(rows)
        seen = [int(row.data.view(torch.int64).unique()) for row in rows]
    assert seen == list(range(1, 60))
    assert not held.data.view(torch.int64).any(), "never written to again"
    assert slots_of_ours() == 1, "the one that is held"
    assert slots[0].made <= AHEAD * 2 + 3
    assert 1 < slots[0].enlarged < 59
    del held
    assert not slots_of_ours()


@pytest.mark.skipif(not can_share(), reason="rows come in memory of their own here")
def test_training_that_fails_gives_its_slots_back() -> None:
    """While the error is held, whose traceback leads to them."""
    rows = read_ahead(Numbers(), [(2, i) for i in range(4)], workers=1, pin=False)
    number = next(rows).tokens  # within an assert, pytest would hold the row
    assert number == 0
    assert slots_of_ours()
    with pytest.raises(errors.DamagedCacheError) as held:
        list(rows)
    assert not slots_of_ours()
    assert held.value.__traceback__ is not None


def test_training_that_stops_for_an_error_of_its_own_ends_its_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the error is held, as a notebook does."""
    ended: list[bool] = []
    steps_from = Stream.steps_from

    def watched(self: Stream, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from steps_from(self, *args, **kwargs)
        finally:
            ended.append(True)

    def fail(step: int, total: int, text: str) -> None:
        assert not ended
        raise KeyError(step)

    monkeypatch.setattr(Stream, "steps_from", watched)
    with pytest.raises(KeyError) as held:
        train(small_training(tmp_path, [60] * 12), progress=fail)
    assert ended
    assert held.value.__traceback__ is not None


@pytest.mark.skipif(not can_share(), reason="rows come in memory of their own here")
def test_a_slot_waits_for_its_copy_to_the_device() -> None:
    class Event:
        done = False

        def query(self) -> bool:
            return self.done

        def synchronize(self) -> None:
            self.done = True

    slots, event = Slots(64, 1, pin=False), Event()
    first = slots.lend()
    data, slot = slots.taken(first.number, first.handle.size, 64)
    slot.copied = event
    del data
    assert slots.lend().number == 1, "the copy may still read it"
    event.done = True
    assert slots.lend().number == 0
    slots.taken(0, first.handle.size, 64)
    assert slot.copied is None
    slot.copied, event.done = event, False
    slots.close()
    assert event.done, "waited for before the memory is unlocked"


@pytest.mark.skipif(not can_share(), reason="rows come in memory of their own here")
@pytest.mark.parametrize("code", [0, 712])
def test_slots_are_page_locked_once(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a thread on the loop's device; where CUDA refuses, that is said once."""
    locked: dict[int, int] = {}
    devices: list[int] = []

    class Cuda:
        def cudaHostRegister(self, at: int, size: int, flags: int) -> int:
            assert (at % mmap.PAGESIZE, flags) == (0, 0)
            locked[at] = size
            return code

        def cudaHostUnregister(self, at: int) -> None:
            del locked[at]

    monkeypatch.setattr(blocks, "_cuda", Cuda)
    monkeypatch.setattr(blocks, "_forget_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    rows = read_ahead(Numbers(), [(4, i) for i in range(30)], workers=0, pin=True, need=Need(8192))
    assert next(rows).tokens == 0
    assert devices == [3]
    wanted = Need(8192).count(0) if not code else 1
    end = time.monotonic() + 10
    while len(locked) < wanted and time.monotonic() < end:  # the thread locks one after another
        time.sleep(0.01)
    assert len(locked) == wanted
    assert [row.tokens for row in rows] == list(range(1, 30))
    assert len(locked) == bool(code), "unlocked with the last row"
    assert caplog.text.count("page-locked") == bool(code)


@pytest.mark.skipif(not can_share(), reason="rows come in memory of their own here")
def test_many_slots_may_be_open() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = max(map(int, os.listdir("/proc/self/fd")))  # other tests' files are open, too
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + 50, hard))
    try:
        slots = Slots(64, 200, pin=False)
        assert len({slots.lend().handle.fd for _ in range(200)}) == 200
        slots.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_readers_that_the_system_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    many = (os.cpu_count() or 1) + 1

    def refuse(self: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(SpawnedProcess, "start", refuse)
    with pytest.raises(
        errors.TrainError, match=rf"{many} processes.*Too many.*--workers.*ulimit -n"
    ):
        list(read_ahead(Numbers(), [(0, 0)], workers=many, pin=False))


@pytest.mark.parametrize("used", [64, 128])
def test_memory_that_the_system_refuses_a_reader(used: int) -> None:
    """To be mapped or enlarged: what to do is said, in an error that the loop raises as it is."""
    gone = Offer(0, blocks.Handle(os.getpid(), 10**6, 64), 64)
    with pytest.raises(errors.TrainError, match=r"No such file.* 1 row of 0.000 GB.*--workers"):
        Room(Desk(), gone)(used)


@pytest.mark.skipif(not can_share(), reason="rows come in memory of their own here")
def test_a_slot_that_the_system_has_no_memory_for_leaves_no_file_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(data_slots, "available", lambda: None)
    with pytest.raises(errors.TrainError, match=r"for 1 row of .*--workers") as held:
        Slots(1 << 60, 1, pin=False)
    assert len(os.listdir("/proc/self/fd")) == before, held


def test_too_little_memory_is_refused_before_a_reader_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_slots, "available", lambda: 10**9)
    with pytest.raises(errors.UsageError, match=r"10 of 0.200 GB.*1.000 GB are.*--workers"):
        read_ahead(Numbers(), [], workers=2, pin=False, need=Need(2 * 10**8))
    assert not multiprocessing.active_children()
