"""Held-out rows: read once, by whichever process, and the same in every validation."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import small_training

from dspark.cache.errors import TrainError
from dspark.train.config import TrainConfig
from dspark.train.data import held
from dspark.train.data.held import HeldOut, kept_bytes, rows_of
from dspark.train.data.row import PackedRow
from dspark.train.data.stream import VALIDATION_EPOCH, Stream
from dspark.train.distributed import World
from dspark.train.loop import train
from dspark.train.run import memory
from dspark.train.run.setup import Run, prepare

LENGTHS = [40, 52, 61, 44, 58, 47, 66, 49, 55, 43, 62, 57, 48, 64]


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small_training(
        tmp_path,
        LENGTHS,
        max_steps=6,
        val_fraction=0.6,
        total_seq_len=70,
        max_anchors=5,
        checkpoint_freq=0.2,
        val_walk_rows=2,
    )


@pytest.fixture
def run(config: TrainConfig) -> Run:
    found = prepare(config)
    assert found.validation is not None
    assert rows_of(found.validation, 0, 1) >= 4  # one reader's, at least
    return found


def flat(steps: Iterator[list[PackedRow]]) -> list[PackedRow]:
    return [row for step in steps for row in step]


def same(a: list[PackedRow], b: list[PackedRow]) -> bool:
    """Between its arrays a row has bytes that nobody writes."""
    return len(a) == len(b) and all(
        x.fields == y.fields and all(torch.equal(f.of(x.data), f.of(y.data)) for f in x.fields)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_rows_are_those_of_the_stream_and_read_once(run: Run, workers: int) -> None:
    stream = run.validation
    assert stream is not None
    plain = flat(stream.steps_from(VALIDATION_EPOCH))
    with HeldOut(stream, workers=workers) as rows:
        once, again = flat(iter(rows)), flat(iter(rows))
    assert same(once, plain)
    assert all(x is y for x, y in zip(once, again, strict=True))
    assert all(row.lent is None for row in once)  # or a reader would write over it
    assert not multiprocessing.active_children()


def test_each_rank_has_its_rows(run: Run) -> None:
    stream = run.validation
    assert stream is not None
    plain = flat(stream.steps_from(VALIDATION_EPOCH))
    parts = [flat(iter(HeldOut(stream, rank=r, world=2))) for r in range(2)]
    assert sum(map(len, parts)) == len(plain)
    assert [len(p) for p in parts] == [rows_of(stream, r, 2) for r in range(2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_validations_do_not_depend_on_who_reads(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    train(config)
    kept = validations_of(tmp_path / "draft")
    assert len(kept) > 2
    monkeypatch.setattr(held, "available", lambda: 0)
    other = tmp_path / "other"
    train(dataclasses.replace(config, output=str(other), workers=workers))
    for a, b in zip(kept, validations_of(other), strict=True):
        assert a == b
    assert not multiprocessing.active_children()


def validations_of(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.get("validation")]


def test_rows_that_do_not_fit_are_read_again_and_said(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = run.validation
    assert stream is not None
    need = kept_bytes(stream, 0, 1)
    for free, kept in ((2 * need, True), (2 * need - 2, False), (None, True)):
        monkeypatch.setattr(held, "available", lambda free=free: free)
        caplog.clear()
        with caplog.at_level("INFO", "dspark.train"), HeldOut(stream) as rows:
            first, second = flat(iter(rows)), flat(iter(rows))
        assert same(first, second)
        assert all((x is y) == kept for x, y in zip(first, second, strict=True))
        assert ("Every validation reads them again" in caplog.text) is not kept


def test_processes_of_a_host_share_its_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them ask for what is left before any has taken its part."""
    stream = run.validation
    assert stream is not None
    need = kept_bytes(stream, 0, 1)
    for local, kept in ((3, True), (4, False)):
        monkeypatch.setattr(held, "available", lambda: 6 * need)
        with HeldOut(stream, local=local) as rows:
            assert rows.kept is kept


def test_ranks_learn_together_that_rows_could_not_be_read(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a collective call, in which the others would wait for the rank that failed."""
    agreed, read, together = World.agreed, Stream.steps_from, list[bool]()
    depth = 0

    def watched(self: World, work: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            return agreed(self, work)
        finally:
            depth -= 1

    def noted(self: Stream, epoch: int, *rest: Any, **more: Any) -> Iterator[list[PackedRow]]:
        if epoch == VALIDATION_EPOCH:
            together.append(depth > 0)
        return read(self, epoch, *rest, **more)

    monkeypatch.setattr(World, "agreed", watched)
    monkeypatch.setattr(Stream, "steps_from", noted)
    train(config)
    assert together == [True]


def test_an_error_of_reading_is_raised_where_the_rows_are_wanted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = run.validation
    assert stream is not None
    went = threading.Event()

    def broken(*args: Any, **options: Any) -> Iterator[list[PackedRow]]:
        went.set()
        raise TrainError("chunk 3 is damaged")
        yield []

    monkeypatch.setattr(Stream, "steps_from", broken)
    with HeldOut(stream, workers=2) as rows:
        assert went.wait(10)
        for _ in range(2):
            with pytest.raises(TrainError, match="chunk 3 is damaged"):
                iter(rows)


def test_readers_end_with_a_training_that_wants_no_rows(run: Run) -> None:
    stream = run.validation
    assert stream is not None
    with HeldOut(stream, workers=2):
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()
    assert not [t for t in threading.enumerate() if t.name == "dspark-held"]


def test_the_memory_of_kept_rows_is_told(run: Run) -> None:
    stream = run.validation
    assert stream is not None
    assert f" for {rows_of(stream, 0, 1)} held-out rows" in memory.describe(run)
    assert kept_bytes(stream, 0, 1) > 0
