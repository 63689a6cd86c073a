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

import pytest
import torch
from dump_runs import Wrapped, assert_same, corpus

from dspark.cache.codec.base import Codec
from dspark.cache.errors import EngineError
from dspark.cache.records import TokenSample
from dspark.cache.shared.blocks import can_share
from dspark.dump.config import DumpConfig
from dspark.dump.engines.engine import GROUPS, Captured, CodedStates, Engine, Fetch, States
from dspark.dump.job import load_engine
from dspark.dump.progress import Display
from dspark.dump.run import dump


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
