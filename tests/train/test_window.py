"""Logged steps are read when the next is queued, and none is lost on the way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_trainings import small_training

from dspark.cache.errors import TrainError
from dspark.train import loop
from dspark.train.config import TrainConfig
from dspark.train.data.feed import Feed
from dspark.train.data.row import PackedRow
from dspark.train.distributed import PeerError, World
from dspark.train.loop import train
from dspark.train.run.saving import Saving
from dspark.train.run.window import Logged


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    lengths = [60, 80, 90, 30, 20, 100, 50, 64]
    return small_training(
        tmp_path,
        lengths,
        max_steps=7,
        total_seq_len=128,
        checkpoint_freq=100,
        log_every=2,
        val_fraction=0,
    )


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    text = (Path(config.output) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_logged_step_is_read_when_the_next_is_queued(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()
    step, row, save = loop.step, Logged.row, Saving.save

    def stepped(run: Any, feed: Any, part: Any, number: int, *rest: Any) -> Any:
        seen.append(f"step {number + 1}")
        return step(run, feed, part, number, *rest)

    def read(self: Logged) -> dict[str, Any]:
        seen.append(f"read {self.position.step}")
        return row(self)

    def saved(self: Saving, position: Any, **more: Any) -> None:
        seen.append(f"save {position.step}")
        save(self, position, **more)

    monkeypatch.setattr(loop, "step", stepped)
    monkeypatch.setattr(Saving, "save", saved)
    monkeypatch.setattr(Logged, "row", read)
    train(config)
    assert seen == [
        "step 1",
        "step 2",
        "read 1",
        "step 3",
        "read 2",
        "step 4",
        "step 5",
        "read 4",
        "step 6",
        "step 7",
        "read 6",
        "read 7",
        "save 7",
    ]


def test_windows_hold_every_step_once(config: TrainConfig) -> None:
    train(config)
    rows = metrics(config)
    assert [r["step"] for r in rows] == [1, 2, 4, 6, 7]
    steps, tokens = 0, 0
    for r in rows:
        window = r["step"] - steps
        # speed x time is what the window trained on, so no step is in two windows or in none
        assert r["tokens_per_second"] * window * r["step_ms"] / 1000 == pytest.approx(
            r["tokens"] - tokens
        )
        steps, tokens = r["step"], r["tokens"]


@pytest.mark.parametrize("error", [TrainError("a chunk is damaged"), OSError("a chunk is damaged")])
def test_a_reader_that_fails_loses_no_row_of_the_steps_before(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    take, calls = Feed.take, 0

    def failing(self: Feed) -> list[PackedRow]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise error
        return take(self)

    monkeypatch.setattr(Feed, "take", failing)
    with pytest.raises(type(error), match="a chunk is damaged"):
        train(config)
    assert [r["step"] for r in metrics(config)] == [1, 2, 4]


def test_nobody_waits_for_the_device_when_a_rank_has_gone(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the steps before have queued may wait for that rank for ever."""
    calls, read = 0, list[int]()

    def gone(self: World, values: Sequence[float]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise PeerError("another process of this run ended")
        return list(values)

    row = Logged.row

    def noted(self: Logged) -> dict[str, Any]:
        read.append(self.position.step)
        return row(self)

    monkeypatch.setattr(World, "sum", gone)
    monkeypatch.setattr(Logged, "row", noted)
    with pytest.raises(PeerError, match="run ended"):
        train(config)
    assert read == [1, 2]  # 4 is logged, and on its way


def test_each_step_logged_and_saved(config: TrainConfig) -> None:
    """Every step is a milestone: nothing is behind."""
    train(dataclasses.replace(config, log_every=1, checkpoint_freq=1e-9, max_steps=3))
    assert [r["step"] for r in metrics(config)] == [1, 2, 3]
    assert (Path(config.output) / "model.safetensors").is_file()
