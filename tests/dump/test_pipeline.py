"""The hand-over from engine to store, with states that are lost, late, or never come."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dump_runs import Wrapped, assert_same, corpus

from dspark.cache.codec.base import Codec
from dspark.cache.errors import EngineError
from dspark.cache.parts.part import PartJob
from dspark.cache.records import TokenSample
from dspark.cache.shared.blocks import SharedBlock, can_share
from dspark.dump.config import DumpConfig
from dspark.dump.corpus.parts import PartRows
from dspark.dump.corpus.reading import _Elsewhere
from dspark.dump.engines.engine import GROUPS, Captured, CodedStates, Engine, Fetch, States
from dspark.dump.job import load_engine
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dspark.dump.workers import WorkerPool
from dspark.dump.writing.pipeline import Pipeline
from dspark.dump.writing.writers import write_shared, write_timed


def test_an_engine_that_loses_a_sample_is_caught(config: DumpConfig, show: Display) -> None:
    class Losing(Wrapped):
        def dumped(
            self, groups: Iterable[Sequence[TokenSample]], codec: Codec
        ) -> Iterator[Captured]:
            captured = self.inner.stream(groups, codec)
            next(captured)
            yield from captured

    with pytest.raises(EngineError, match=r"returned states for \d+ of \d+ samples of part \d"):
        dump(config, show, lambda plan, n: Losing(load_engine(plan, n), lambda: None))


class Coming(Wrapped):
    """States on the host that arrive only once ``ahead`` batches have been handed over; ``fail``:
    the first one never does.
    """

    def __init__(self, inner: Engine, ahead: int, fail: bool = False) -> None:
        super().__init__(inner, lambda: None)
        self.ahead, self.fail = ahead, fail
        self.given = threading.Semaphore(0)

    def dumped(self, groups: Iterable[Sequence[TokenSample]], codec: Codec) -> Iterator[Captured]:
        for number, captured in enumerate(self.inner.stream(groups, codec)):
            assert isinstance(captured.states, States)
            arrays = {name: t.numpy() for name, t in codec.encode(*captured.states).items()}
            fetch = partial(self.fetch, number, CodedStates(arrays))
            yield Captured(captured.group, captured.members, fetch)
            self.given.release()  # the engine's thread is here again

    def fetch(self, number: int, states: CodedStates) -> CodedStates:
        if self.fail and number == 0:
            raise EngineError("the worker died")
        if number == 0:
            assert all(self.given.acquire(timeout=30) for _ in range(self.ahead))
        return states


def test_the_engine_goes_on_while_its_states_are_on_their_way(
    config: DumpConfig, show: Display, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, batch_tokens=32)  # several batches per part
    dump(config, show)
    other = dataclasses.replace(config, output=tmp_path / "again.zarr")
    dump(other, show, lambda plan, n: Coming(load_engine(plan, n), 5))
    assert_same(config.output, other.output)


def test_no_engine_waits_for_the_states_of_another(
    config: DumpConfig, show: Display, tmp_path: Path
) -> None:
    """Of two engines, the first part's states arrive only when the second part's have been put in
    place. One thread reads all that an engine has made, whichever parts it got: of two, both could
    wait for one batch with rows of both parts.
    """
    threads: dict[int, set[int]] = {0: set(), 1: set()}

    class Two(Coming):
        def __init__(self, inner: Engine) -> None:
            super().__init__(inner, 0)
            self.groups_at_once = 2 * GROUPS
            self.second = threading.Event()

        def dumped(
            self, groups: Iterable[Sequence[TokenSample]], codec: Codec
        ) -> Iterator[Captured]:
            for c in super().dumped(groups, codec):
                assert callable(c.states)
                states = partial(self.of_group, c.group, c.states)
                yield c._replace(states=states, engine=(c.group + 1) // 2 % 2)

        def of_group(self, group: int, fetch: Fetch) -> CodedStates:
            threads[(group + 1) // 2 % 2].add(threading.get_ident())
            if group == 0:
                assert self.second.wait(timeout=30)
            states = fetch()
            if group == 1:
                self.second.set()
            return states

    config = dataclasses.replace(config, batch_tokens=32)
    dump(config, show)
    other = dataclasses.replace(config, output=tmp_path / "again.zarr")
    dump(other, show, lambda plan, n: Two(load_engine(plan, n)))
    assert_same(config.output, other.output)
    assert [len(own) for own in threads.values()] == [1, 1]
    assert threads[0] != threads[1]


def test_states_that_never_come_stop_the_dump(config: DumpConfig, show: Display) -> None:
    with pytest.raises(EngineError, match="the worker died"):
        dump(config, show, lambda plan, n: Coming(load_engine(plan, n), 5, fail=True))


def test_out_of_memory_names_flags_that_the_command_takes(
    config: DumpConfig, show: Display
) -> None:
    """A store that is gone on with keeps its size of a part: that flag is for a new one."""

    class Full(Coming):
        def fetch(self, number: int, states: CodedStates) -> CodedStates:
            if number == 9:
                raise torch.OutOfMemoryError("2 GiB")
            return states

    config = dataclasses.replace(config, batch_tokens=64)
    with pytest.raises(
        EngineError,
        match=r"2 GiB.*--batch-tokens .*--resume.*--part-tokens, which needs a new store",
    ):
        dump(config, show, lambda plan, n: Full(load_engine(plan, n), 0))
    assert dump(dataclasses.replace(config, resume=True, batch_tokens=32), show)["complete"]


def blocks_of_ours() -> int:
    """Files in memory that this process has open or mapped for parts."""
    found = Path("/proc/self/maps").read_text().splitlines()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, as the listing's own is
            found.append(os.readlink(fd))
    return sum("dspark-part" in text for text in found)


@pytest.mark.skipif(not can_share(), reason="parts are written by threads here")
@pytest.mark.parametrize("stage", ["engine", "encoder"])
def test_a_dump_that_fails_gives_its_blocks_back(
    config: DumpConfig, show: Display, stage: str
) -> None:
    """While the error is held, whose traceback leads to them: a program that tries again must not
    run out of memory.
    """
    count = itertools.count()

    def fail() -> None:
        if next(count) == 20:
            assert blocks_of_ours()
            raise EngineError("the worker died")

    config = dataclasses.replace(config, workers=1, batch_tokens=32)
    with pytest.raises(EngineError, match="the worker died") as held:
        if stage == "engine":
            dump(config, show, lambda plan, n: Wrapped(load_engine(plan, n), fail))
        else:
            dump(config, show, lambda plan, n: Coming(load_engine(plan, n), 5, fail=True))
    assert blocks_of_ours() == 0
    assert held.value.__traceback__ is not None


def test_no_more_than_so_many_batches_are_waited_for(
    config: DumpConfig, show: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread is held back once two are on their way and a third is being fetched."""
    monkeypatch.setattr("dspark.dump.writing.pipeline.COMING", 2)

    class Bounded(Coming):
        def fetch(self, number: int, states: CodedStates) -> CodedStates:
            if number == 0:
                assert all(self.given.acquire(timeout=30) for _ in range(3))
                assert not self.given.acquire(timeout=0.5), "a fourth batch went in"
            return states

    config = dataclasses.replace(config, batch_tokens=32)
    dump(config, show, lambda plan, n: Bounded(load_engine(plan, n), 0))


@pytest.mark.skipif(not can_share(), reason="parts are written by threads here")
@pytest.mark.parametrize(("victim", "task"), [(0, "reads rows"), (1, "writes parts")])
def test_a_killed_worker_process_is_named_and_resume_goes_on(
    config: DumpConfig,
    show: Display,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_rows: Callable[..., Path],
    victim: int,
    task: str,
) -> None:
    """As the kernel does it when memory runs out: what was whole stays, nothing is left behind, and
    the store becomes that of an unbroken run.
    """
    monkeypatch.setattr("dspark.dump.job.PROCESS_ROWS", 1)
    # so that rows are left when one is killed
    monkeypatch.setattr("dspark.dump.corpus.tokenise.CHUNK", 4)
    rows = write_rows(corpus(200), "long.jsonl")
    config = dataclasses.replace(config, data=str(rows), workers=1)
    whole = dataclasses.replace(config, output=tmp_path / "whole.zarr", workers=0)
    dump(whole, show)
    count = itertools.count()

    def written() -> int:
        return len(list((config.output / "parts").glob("0*")))

    def kill() -> None:
        if next(count) == 40:
            deadline = time.monotonic() + 60
            while not written() and time.monotonic() < deadline:
                time.sleep(0.01)
            # The one that reads is started first.
            processes = sorted(multiprocessing.active_children(), key=lambda p: p.pid or 0)
            assert len(processes) == 2
            os.kill(processes[victim].pid or 0, signal.SIGKILL)

    with pytest.raises(
        EngineError, match=f"a process that {task} .*memory.*--resume.*fewer --workers"
    ):
        dump(config, show, lambda plan, n: Wrapped(load_engine(plan, n), kill))
    assert 0 < written() < len(list((whole.output / "parts").glob("0*")))
    deadline = time.monotonic() + 60  # the pool that was not hit is told to end and not waited for
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []
    dump(dataclasses.replace(config, resume=True), show)
    assert_same(config.output, whole.output)


def last_part(config: DumpConfig) -> int:
    return len(list((config.output / "parts").glob("0*"))) - 1


def test_the_last_part_is_waited_for_and_memory_is_freed_meanwhile(
    config: DumpConfig, show: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written only once every other block has been freed."""
    dump(config, show)
    last, freed, blocks = last_part(config), threading.Semaphore(0), 0
    close, init = SharedBlock.close, Pipeline.__init__

    def closing(block: SharedBlock) -> None:
        close(block)
        freed.release()

    def making(self: Pipeline, *args: Any, **options: Any) -> None:
        nonlocal blocks
        init(self, *args, **options)
        blocks = len(self._all)

    def late(job: PartJob, states: Any) -> Any:
        if job.index == last:
            assert all(freed.acquire(timeout=30) for _ in range(blocks - 1)), "still held"
        return write_timed(job, states)

    monkeypatch.setattr(SharedBlock, "close", closing)
    monkeypatch.setattr(Pipeline, "__init__", making)
    monkeypatch.setattr("dspark.dump.writing.pipeline.write_timed", late)
    other = dataclasses.replace(config, output=tmp_path / "again.zarr")
    assert dump(other, show)["complete"]
    assert blocks > 2
    assert_same(config.output, other.output)
    assert freed.acquire(timeout=30)  # the last one


@pytest.mark.skipif(not can_share(), reason="parts are written by threads here")
def test_the_last_part_gets_the_cores_of_idle_writers(
    config: DumpConfig, show: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody waits for the processes: for what they have written only."""
    dump(config, show)
    last, other = last_part(config), dataclasses.replace(config, output=tmp_path / "again.zarr")
    given: dict[int, int] = {}
    waited: list[bool] = []
    pipelines: list[Pipeline] = []
    submit, shutdown, settle = WorkerPool.submit, WorkerPool.shutdown, Pipeline.settle

    def submitting(self: WorkerPool, fn: Any, *args: Any, **options: Any) -> Any:
        if fn is write_shared:
            given[args[0].index] = args[-1]
        return submit(self, fn, *args, **options)

    def ending(self: WorkerPool, wait: bool = True, *, cancel_futures: bool = False) -> None:
        waited.append(wait)
        shutdown(self, wait, cancel_futures=cancel_futures)

    def settling(self: Pipeline) -> None:
        pipelines.append(self)
        settle(self)

    def until(found: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not found() and time.monotonic() < deadline:
            time.sleep(0.01)

    class Slow(Coming):
        """The last batch arrives when all other parts are there and the engine has ended."""

        def dumped(
            self, groups: Iterable[Sequence[TokenSample]], codec: Codec
        ) -> Iterator[Captured]:
            held: Captured | None = None
            for captured in super().dumped(groups, codec):
                if held is not None:
                    yield held
                held = captured
            assert held is not None
            yield held._replace(states=partial(self.at_last, held.states))

        def at_last(self, states: Any) -> CodedStates:
            until(lambda: bool(pipelines) and pipelines[0]._ending)
            until(lambda: pipelines[0]._writing == 0)
            found: CodedStates = states()
            return found

    monkeypatch.setattr(WorkerPool, "submit", submitting)
    monkeypatch.setattr(WorkerPool, "shutdown", ending)
    monkeypatch.setattr(Pipeline, "settle", settling)
    other = dataclasses.replace(other, workers=3)
    dump(other, show, lambda plan, n: Slow(load_engine(plan, n), 0))
    assert_same(config.output, other.output)
    assert given[0] == 3
    assert given[last] == 1
    assert waited
    assert not any(waited)


@pytest.mark.skipif(not can_share(), reason="no process reads rows here")
def test_rows_are_read_while_the_engine_is_checked(
    config: DumpConfig, show: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark.dump.job.PROCESS_ROWS", 1)
    dump(config, show)
    read = threading.Event()
    parts = _Elsewhere.parts

    def reading(self: _Elsewhere, committed: Any) -> Iterator[PartRows]:
        for part in parts(self, committed):
            read.set()
            yield part

    class Waiting(Wrapped):
        def __init__(self, inner: Engine) -> None:
            super().__init__(inner, lambda: None)
            self.capture = self.checked_late

        def checked_late(self, samples: Sequence[TokenSample]) -> Iterator[tuple[int, States]]:
            assert read.wait(timeout=60), "no part was read"
            yield from self.inner.capture(samples)

    monkeypatch.setattr(_Elsewhere, "parts", reading)
    other = dataclasses.replace(config, output=tmp_path / "again.zarr", workers=1)
    dump(other, show, lambda plan, n: Waiting(load_engine(plan, n)))
    assert_same(config.output, other.output)
