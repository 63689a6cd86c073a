"""Worker processes: all there before one works, what they start with reaches each of them, and
nothing stays behind.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import CancelledError
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, cast

import pytest

from dspark.cache.errors import EngineError, UsageError
from dspark.dump.corpus.reading import RowsProcess
from dspark.dump.workers import WorkerPool


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_all_start_with_what_they_are_given(folder: Path) -> None:
    with WorkerPool(2, "tests", sys.setrecursionlimit, (4321,)) as pool:
        pool.wait_until_started()
        assert list(folder.iterdir()) == []
        # Nobody was idle before both were there, so both were started.
        assert len(multiprocessing.active_children()) >= 2
        assert {f.result() for f in [pool.submit(sys.getrecursionlimit) for _ in range(8)]} == {
            4321
        }


def test_one_that_dies_at_the_start_is_an_error(folder: Path) -> None:
    pool = WorkerPool(2, "tests", os._exit, (3,))
    with pytest.raises(EngineError, match=r"a process that tests ended early \(one of 2,"):
        pool.wait_until_started()
    pool.close()
    assert list(folder.iterdir()) == []


class Dying:
    """Ends the process that it is sent to."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def test_one_below_another_that_dies_at_the_start_leaves_no_file_and_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for processes
    rows: Any = RowsProcess(cast(Any, Dying()), 1)
    with pytest.raises(EngineError, match="a process that reads rows ended early"):
        rows.wait_until_started()
    rows.close()
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(tmp_path.glob("dspark-*"))
    assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_while_it_is_made_leaves_no_file(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        WorkerPool(2, "tests", os.getpid, (Interrupting(),))
    assert list(folder.iterdir()) == []


class Interrupting:
    def __reduce__(self) -> str:
        raise KeyboardInterrupt


def test_what_cannot_be_sent_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"that tokenises rows .*lock.* --workers 0"):
        WorkerPool(1, "tokenises rows", os.getpid, (threading.Lock(),))
    assert list(folder.iterdir()) == []


def test_one_that_is_killed_says_so_of_every_task(folder: Path) -> None:
    with WorkerPool(2, "writes parts") as pool:
        pool.wait_until_started()
        victim = pool.submit(os.getpid).result(timeout=60)
        tasks = [pool.submit(time.sleep, 600) for _ in range(9)]  # under way and waiting
        os.kill(victim, signal.SIGKILL)
        said = "a process that writes parts .*memory ran out.*--resume.*fewer --workers than 2"
        for task in tasks:
            with pytest.raises(EngineError, match=said):
                task.result(timeout=60)
        with pytest.raises(EngineError, match=said):
            pool.submit(os.getpid)
    assert multiprocessing.active_children() == []


def test_what_a_task_raises_is_raised_and_what_waits_is_given_up(folder: Path) -> None:
    pool = WorkerPool(1, "tests")
    pool.wait_until_started()
    with pytest.raises(FileNotFoundError):
        pool.submit(os.stat, "/none").result(timeout=60)
    tasks = [pool.submit(time.sleep, 0.2) for _ in range(20)]
    pool.close()
    with pytest.raises(CancelledError):
        tasks[-1].result(timeout=60)
    pool.shutdown(wait=True)


def test_whoever_waits_for_a_task_is_let_go(folder: Path) -> None:
    """By ``close``: the thread that reads ahead waits for a part that nobody wants any more."""
    pool = WorkerPool(1, "tests")
    pool.wait_until_started()
    task = pool.submit(time.sleep, 5)
    closing = threading.Timer(0.5, pool.close)
    closing.start()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        task.result(timeout=60)
    assert time.monotonic() - began < 4
    closing.join()
    for process in multiprocessing.active_children():  # it ends when it has slept
        process.join(timeout=60)
        while process.exitcode is None and time.monotonic() - began < 60:
            time.sleep(0.01)  # the pool's thread has joined it, and is about to say so
        assert process.exitcode == 0


def test_a_process_ends_without_taking_itself_apart(folder: Path) -> None:
    """It does what ``multiprocessing`` does at its end, and then none of Python's."""
    others = multiprocessing.active_children()
    pool = WorkerPool(1, "tests", atexit.register, (os.mkdir, str(folder / "python")))
    pool.wait_until_started()
    pool.submit(Finalize, None, os.mkdir, (str(folder / "ours"),), None, 10).exception(timeout=60)
    (process,) = set(multiprocessing.active_children()) - set(others)
    pool.shutdown(wait=True)
    assert process.exitcode == 0
    assert [path.name for path in folder.iterdir()] == ["ours"]
