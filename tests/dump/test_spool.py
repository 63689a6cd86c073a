"""Spool files are read once, deleted, and a failed write is an error with its reason."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark.cache.codec import registry
from dspark.cache.shared.blocks import can_share
from dspark.dump.engines.vllm.slots import Slots
from dspark.dump.engines.vllm.spool import (
    Coding,
    SpoolError,
    SpoolReader,
    hold,
    report_failure,
    to_host,
    write_batch,
)

needs_sharing = pytest.mark.skipif(not can_share(), reason="no memory to share here")


def write(path: Path, slots: Slots | None = None) -> dict[str, torch.Tensor]:
    """Three requests of 2, 1 and 3 tokens, of which 1, 0 and 2 last states are stored."""
    arrays = {
        "hidden_states": torch.randn(6, 2, 5).to(torch.bfloat16),
        "aux_code": torch.arange(42, dtype=torch.uint8).view(6, 7),
        "last_code": torch.arange(12, dtype=torch.int16).view(3, 4),
    }
    told = {"tokens": torch.tensor([2, 1, 3]), "lasts": torch.tensor([1, 0, 2]), "times": times()}
    write_batch(str(path), to_host(arrays, slots), told)
    return arrays


def times() -> torch.Tensor:
    """Came 10 s ago, was begun 7 s ago, gathered 6 s ago and on the host 2 s ago."""
    return time.time() - torch.tensor([10.0, 7.0, 6.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=needs_sharing)])
def test_read_once_and_deleted(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "1.batch"
    want = write(path, Slots() if shared else None)
    reader = SpoolReader(tmp_path)
    rows = {"hidden_states": [0, 1, 3, 4, 5], "aux_code": [0, 1, 3, 4, 5], "last_code": [0, 1, 2]}
    found = reader.take(str(path), [0, 2])
    assert not list(tmp_path.iterdir())
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name][rows[name]]) for name in want)
    found = reader.take(str(path), [1])
    assert torch.equal(found["hidden_states"], want["hidden_states"][2:3])
    assert found["last_code"].shape == (0, 4)
    assert not reader._batches


def test_a_batch_without_stored_rows(tmp_path: Path) -> None:
    arrays = {"last_code": torch.zeros(0, 4), "token_ids": torch.zeros(1, dtype=torch.int32)}
    told = {"tokens": torch.tensor([1]), "lasts": torch.tensor([0]), "times": times()}
    write_batch(str(tmp_path / "1"), to_host(arrays), told)
    assert SpoolReader(tmp_path).take(str(tmp_path / "1"), [0])["last_code"].shape == (0, 4)


def test_the_worker_s_time_is_told_once(tmp_path: Path) -> None:
    reader = SpoolReader(tmp_path)
    assert reader.spent() == {}
    for name in "12":
        write(tmp_path / name)
        reader.take(str(tmp_path / name), [0])
    reader.take(str(tmp_path / "1"), [1, 2])
    want = {
        "worker: wait for a writer": 6,
        "worker: gather": 2,
        "worker: code and copy": 8,
        "worker: write": 4,
    }
    assert reader.spent() == pytest.approx(want, abs=0.5)
    assert reader.spent() == {}


def test_a_reader_waits_while_the_worker_lives(tmp_path: Path) -> None:
    path, lock = tmp_path / "1.batch", hold(str(tmp_path))
    timer = threading.Timer(0.2, write, [path])
    began = time.monotonic()
    timer.start()
    assert SpoolReader(tmp_path).take(str(path), [1])["aux_code"].shape == (1, 7)
    assert time.monotonic() - began > 0.15
    os.close(lock)


def test_a_failed_write_tells_why(tmp_path: Path) -> None:
    path = tmp_path / "1.batch"
    (tmp_path / "1.batch.part").touch()
    assert report_failure(str(path), OSError(28, "No space left on device"), 2)
    reader = SpoolReader(tmp_path)
    for _ in range(2):  # nobody waits for what is known to be lost
        with pytest.raises(
            SpoolError, match="the worker could not write .*No space left on device"
        ) as found:
            reader.take(str(path), [0])
        assert found.value.index == 2
    assert not list(tmp_path.iterdir())


def test_a_file_that_never_came(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="wrote no .*its disk is full"):
        SpoolReader(tmp_path).take(str(tmp_path / "1.batch"), [0])
    lock = hold(str(tmp_path))
    threading.Timer(0.2, os.close, [lock]).start()
    with pytest.raises(SpoolError, match="it died"):
        SpoolReader(tmp_path).take(str(tmp_path / "2.batch"), [0])


def test_a_worker_that_hangs_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark.dump.engines.vllm.spool.WAIT_SECONDS", 0.1)
    lock = hold(str(tmp_path))
    with pytest.raises(
        SpoolError, match=r"the worker is alive but has written no .*1\.batch for 0\.1 s"
    ):
        SpoolReader(tmp_path).take(str(tmp_path / "1.batch"), [0])
    os.close(lock)


@needs_sharing
def test_a_slot_is_used_again_only_when_its_batch_is_no_longer_needed(tmp_path: Path) -> None:
    slots, reader = Slots(), SpoolReader(tmp_path)
    want = write(tmp_path / "1", slots)
    first = reader.take(str(tmp_path / "1"), [0])["aux_code"].numpy()
    later = reader.take(str(tmp_path / "1"), [1, 2])
    write(tmp_path / "2", slots)
    assert len(slots._slots) == 2
    del later
    write(tmp_path / "3", slots)
    assert len(slots._slots) == 3
    assert np.array_equal(first, want["aux_code"][:2])
    del first
    gc.collect()
    write(tmp_path / "4", slots)
    assert len(slots._slots) == 3
    for name in "234":
        found = reader.take(str(tmp_path / name), [0, 1, 2])
        assert torch.equal(found["aux_code"], want["aux_code"])


@needs_sharing
def test_what_no_slot_has_room_for_goes_by_file(tmp_path: Path) -> None:
    small = {"aux_code": torch.arange(64, dtype=torch.uint8).view(4, 16)}
    large = {"aux_code": torch.arange(2048, dtype=torch.int16).view(4, 512)}
    slots, reader = Slots(limit=5000), SpoolReader(tmp_path)
    one, none = {"tokens": torch.tensor([4]), "lasts": torch.tensor([0])}, []
    for name, arrays in (("1", small), ("2", large), ("3", large), ("4", small)):
        batch = to_host(arrays, slots)
        none.append(batch.slot is None)
        write_batch(str(tmp_path / name), batch, one | {"times": times()})
    assert none == [False, False, True, False]
    for name, arrays in (("3", large), ("2", large), ("1", small), ("4", small)):
        assert torch.equal(reader.take(str(tmp_path / name), [0])["aux_code"], arrays["aux_code"])
    # Free again, and small: one of them grows, as far as the limit allows.
    assert to_host({"aux_code": torch.zeros(4200, dtype=torch.uint8)}, slots).slot is not None
    assert to_host({"aux_code": torch.zeros(9000, dtype=torch.uint8)}, slots).slot is None
    assert sum(slot.block.size for slot in slots._slots) <= 5000


@pytest.mark.parametrize("columns", [[0, 1], [1, 2], [2], [2, 0], [1, 1]])
def test_the_layers_of_a_store_are_taken_whether_adjacent_or_not(columns: list[int]) -> None:
    states, codec = torch.randn(5, 4, 64), registry.make("rotated-4-16")
    stored, ids = torch.tensor([1, 3]), np.arange(5, dtype=np.int32)
    got = Coding(codec, columns, 3, torch.nn.Identity()).encode(states, stored, ids, [5])
    want = codec.encode(states[:, columns], states[stored, 3])
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
