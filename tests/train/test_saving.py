"""Checkpoints are written while training goes on: what is in them, what waits for them, and what
happens to their errors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_trainings import small_training

from dspark.cache import errors
from dspark.cache.errors import StoreWriteError
from dspark.cache.files.lock import Lock
from dspark.train.config import TrainConfig
from dspark.train.loop import train
from dspark.train.run import checkpoint, saving
from dspark.train.run.history import Session
from dspark.train.run.saving import Saving
from dspark.train.run.setup import prepare

LENGTHS = [60, 80, 90, 30, 20, 100, 50, 64, 90, 77, 33, 40]
EVERY, STEPS = 4, 12  # steps
LONG = 60.0  # seconds, after which a test fails


class Stop(Exception):
    """Raised by a progress callback, in place of a failing step."""


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    config = small_training(tmp_path, LENGTHS, max_steps=STEPS, keep_checkpoints=10)
    per_epoch = prepare(config).stream.steps(0)
    return dataclasses.replace(config, checkpoint_freq=EVERY / per_epoch)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Each release of it lets one checkpoint be written."""
    save, allowed = checkpoint.save, threading.Semaphore(0)

    def later(*given: Any) -> Path:
        assert allowed.acquire(timeout=LONG), "training did not go on"
        return save(*given)

    monkeypatch.setattr(checkpoint, "save", later)
    return allowed


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    speed = {"tokens_per_second", "step_ms", "data_wait_fraction"}
    text = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in speed} for line in text]


def saved(config: TrainConfig) -> list[str]:
    return [path.name for path in checkpoint.found(Path(config.output) / "checkpoints")]


def same_tensors(a: Path, b: Path) -> None:
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def same_checkpoints(config: TrainConfig, like: TrainConfig) -> None:
    """All tensors, and the positions but for the clock."""
    assert saved(config) == saved(like)
    for name in saved(config):
        a, b = (Path(c.output) / "checkpoints" / name for c in (config, like))
        for file in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
            same_tensors(a / file, b / file)
        states = [checkpoint.read_state(path) for path in (a, b)]
        one, other = (dataclasses.replace(s.position, seconds=0.0) for s in states)
        assert (one, states[0].store) == (other, states[1].store)


def in_turn(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, name: str) -> TrainConfig:
    """A training beside ``config`` that waits for its checkpoints, as the host has no memory."""
    config = dataclasses.replace(config, output=str(Path(config.output).with_name(name)))
    with monkeypatch.context() as little:
        little.setattr(saving, "available", lambda: 0)
        train(config)
    return config


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_holds_the_values_of_its_step_though_training_goes_on(
    config: TrainConfig,
    optimizer: str,
    held: threading.Semaphore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(config, optimizer=optimizer)

    def progress(step: int, total: int, text: str) -> None:
        # Three steps after each milestone; before the last one, which nothing follows.
        if (step > EVERY and step % EVERY == EVERY - 1) or step == STEPS:
            held.release()

    train(config, progress=progress)
    monkeypatch.undo()
    like = in_turn(config, monkeypatch, "like")
    assert saved(config) == ["step_00000004", "step_00000008", "step_00000012"]
    same_checkpoints(config, like)
    same_tensors(*(Path(c.output) / "model.safetensors" for c in (config, like)))
    assert rows(config) == rows(like)


def test_a_milestone_waits_for_the_save_before_it(
    config: TrainConfig, held: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copy takes the memory that the one before is written from."""
    save, begun = Saving.save, list[int]()

    def slow(self: Saving, position: checkpoint.Position, **more: Any) -> None:
        begun.append(position.step)
        for seconds in (0.5,) * (position.step > EVERY) + (2.0,) * (position.step == STEPS):
            threading.Timer(seconds, held.release).start()
        save(self, position, **more)

    monkeypatch.setattr(Saving, "save", slow)
    train(config)
    assert begun == [4, 8, 12]
    monkeypatch.undo()
    same_checkpoints(config, in_turn(config, monkeypatch, "like"))


def test_a_host_with_little_memory_waits_and_says_so_once(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = list[threading.Thread]()
    save = checkpoint.save

    def seen(*given: Any) -> Path:
        threads.append(threading.current_thread())
        return save(*given)

    monkeypatch.setattr(checkpoint, "save", seen)
    like = in_turn(config, monkeypatch, "like")
    assert threads == [threading.main_thread()] * 3
    log = (Path(like.output) / "train.log").read_text()
    assert log.count("training waits for each checkpoint while it is written") == 1
    train(config)
    assert threading.main_thread() not in threads[3:]
    assert "training waits" not in (Path(config.output) / "train.log").read_text()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_memory_of_the_copies_is_what_a_snapshot_takes_and_is_used_again(
    config: TrainConfig, optimizer: str, tmp_path: Path
) -> None:
    run = prepare(dataclasses.replace(config, optimizer=optimizer))
    (tmp_path / "out").mkdir()
    with Saving(run, tmp_path / "out") as saving_:
        places = list[int]()
        for step in (1, 2):
            saving_.save(checkpoint.Position(step), export=True)
            assert saving_._block is not None
            assert saving_._used == saving_._block.size == run.optimizer.snapshot_bytes()
            places.append(saving_._block.array(saving.Region(0, (1,), "uint8")).ctypes.data)
        assert places[0] == places[1]
    assert [p.name for p in checkpoint.found(tmp_path / "out" / "checkpoints")] == [
        "step_00000001",
        "step_00000002",
    ]


def test_the_thread_works_on_the_gpu_of_the_training(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new thread's GPU is the first one; of ``--device cuda`` torch tells no number."""
    run = prepare(config)
    threads = dict[str, Any]()

    def set_device(device: torch.device) -> None:
        threads[threading.current_thread().name] = device

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    # a copy "from the device" is not waited for here, and nothing is page-locked
    monkeypatch.setattr(saving.SharedBlock, "pin", lambda self: None)
    device = dataclasses.replace(run.compute, device=torch.device("cuda"))
    with Saving(dataclasses.replace(run, compute=device), tmp_path) as saving_:
        saving_.save(checkpoint.Position(1), export=False)
    assert threads == {"dspark-saving_0": torch.device("cuda", 1)}


def test_files_appear_in_order_and_one_save_ends_before_the_next_begins(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()

    def watch(where: Any, name: str) -> None:
        real = getattr(where, name)

        def call(*given: Any, **more: Any) -> Any:
            out = real(*given, **more)
            if threading.current_thread() is not threading.main_thread():
                seen.append(name)
            return out

        monkeypatch.setattr(where, name, call)

    watch(Lock, "check")
    watch(saving, "save_draft")
    watch(checkpoint, "save")
    watch(Session, "saved")
    train(config)
    assert seen == 3 * ["check", "save_draft", "save", "saved"]


def failing(error: Exception, at: int) -> Callable[..., Path]:
    """In place of ``checkpoint.save``: the checkpoint of step ``at`` fails."""
    save = checkpoint.save

    def call(folder: Path, position: checkpoint.Position, *rest: Any) -> Path:
        if position.step == at:
            raise error
        return save(folder, position, *rest)

    return call


@pytest.mark.parametrize("at", [EVERY, STEPS])
def test_a_write_that_fails_ends_the_training_before_the_next_one(
    config: TrainConfig, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = StoreWriteError("the disk is full")
    monkeypatch.setattr(checkpoint, "save", failing(error, at))
    with pytest.raises(StoreWriteError, match="the disk is full"):
        train(config)
    assert sum("validation" in row for row in rows(config)) == at // EVERY
    assert saved(config) == [f"step_{step:08d}" for step in range(EVERY, at, EVERY)]
    record = json.loads((Path(config.output) / "history.json").read_text())
    assert record["sessions"] == [{"from_step": 0, "to_step": at - EVERY, "ended": "failed"}]
    monkeypatch.undo()
    train(config, resume=True)
    assert saved(config)[-1] == "step_00000012"


def test_a_write_that_fails_is_noticed_at_the_next_step(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save", failing(StoreWriteError("full"), EVERY))
    take = Saving.check
    checks = 0

    def check(self: Saving) -> None:
        nonlocal checks
        if self._writing is not None:
            checks += 1
            with pytest.raises(StoreWriteError):
                self._writing.result()
        take(self)

    monkeypatch.setattr(Saving, "check", check)
    with pytest.raises(StoreWriteError, match="full"):
        train(config)
    assert checks == 1
    assert rows(config)[-1] == {**rows(config)[-1], "step": EVERY, "validation": True}


def test_a_lost_lock_writes_nothing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Lock) -> None:
        raise errors.LostLockError("another process may be writing there")

    monkeypatch.setattr(Lock, "check", lost)
    with pytest.raises(errors.LostLockError):
        train(config)
    assert saved(config) == []
    assert not (Path(config.output) / "model.safetensors").exists()


@pytest.mark.parametrize("broken", [False, True])
def test_a_step_that_fails_does_not_lose_the_checkpoint_that_is_being_written(
    config: TrainConfig, broken: bool, held: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken:  # behind the wait

        def full(*given: Any, **more: Any) -> None:
            raise StoreWriteError("the disk is full")

        monkeypatch.setattr(checkpoint, "staged", full)

    def progress(step: int, total: int, text: str) -> None:
        if step == EVERY + 2:
            threading.Timer(0.5, held.release).start()
            raise Stop

    with pytest.raises(Stop):
        train(config, progress=progress)
    assert saved(config) == ([] if broken else ["step_00000004"])
    log = (Path(config.output) / "train.log").read_text()
    assert ("being written failed too: the disk is full" in log) is broken
    if not broken:
        record = json.loads((Path(config.output) / "history.json").read_text())
        assert record["sessions"] == [{"from_step": 0, "to_step": 4, "ended": "failed"}]


def test_a_signal_while_a_checkpoint_is_written_loses_nothing(
    config: TrainConfig, held: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def progress(step: int, total: int, text: str) -> None:
        if step == EVERY + 1:
            os.kill(os.getpid(), signal.SIGTERM)
            for seconds in (0.5, 1.5):  # that of the milestone, then the interrupt's own
                threading.Timer(seconds, held.release).start()

    with pytest.raises(errors.Stopped, match=r"Step [56] is saved in .*Rerun"):
        train(config, progress=progress)
    monkeypatch.undo()
    found = checkpoint.found(Path(config.output) / "checkpoints")
    assert [path.name for path in found] in (
        ["step_00000004", "step_00000005"],
        ["step_00000004", "step_00000006"],
    )
    for path in found:
        checkpoint.read_state(path)
    train(config, resume=True)
    whole = dataclasses.replace(config, output=str(Path(config.output).with_name("whole")))
    train(whole)
    assert rows(config) == rows(whole)
    same_tensors(*(Path(c.output) / "model.safetensors" for c in (config, whole)))


def test_pruning_keeps_the_newest(config: TrainConfig) -> None:
    train(dataclasses.replace(config, keep_checkpoints=1))
    assert saved(config) == ["step_00000012"]


@pytest.mark.parametrize("where", ["master", "exp_avg", "exp_avg_sq"])
def test_values_that_are_not_finite_are_found_on_the_device(
    config: TrainConfig, where: str, tmp_path: Path
) -> None:
    run = prepare(config)
    optimizer: Any = run.optimizer
    assert optimizer.finite()
    bucket = optimizer._of["fc.weight"]
    master = bucket.master.data
    flat = master if where == "master" else optimizer._rules[0].moment(where, bucket.master)
    flat[bucket.at["fc.weight"] + 5] = float("nan")
    assert not optimizer.finite()
    named = "weight" if where == "master" else where
    with (
        Saving(run, tmp_path) as saving_,
        pytest.raises(errors.TrainError, match=f"after step 3 {named} fc.weight has values that"),
    ):
        saving_.save(checkpoint.Position(3), export=True)
    assert not (tmp_path / "checkpoints").exists()
