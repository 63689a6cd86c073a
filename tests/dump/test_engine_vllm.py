"""Real vLLM against transformers: same ids, same states. One start for the engine, one for the
command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import families
import numpy as np
import pytest
import torch

import dspark.cache
from dspark.cache.codec import registry
from dspark.cache.codec.base import to_numpy
from dspark.cache.errors import EngineError
from dspark.cache.records import KEY_BYTES, TokenSample, last_rows
from dspark.cache.settings import LOSSLESS, rotated_name
from dspark.dump.checks.states import check
from dspark.dump.engines.answers import Ask, Sampling
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.engines.vllm.engine import (
    FEEDING,
    Member,
    VllmEngine,
    extracted_ids,
    runs,
    same_on_ranks,
    step_tokens,
    waves,
)
from dspark.dump.engines.vllm.launch import check_version
from dspark.dump.engines.vllm.spool import (
    IDS,
    STAGES,
    SpoolReader,
    report_failure,
    to_host,
    write_batch,
)
from dspark.dump.target.config import load_target
from dump_targets import samples

if TYPE_CHECKING:
    from dspark.dump.target.layers import Shapes

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
def running(
    tiny: Path, shapes: Shapes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
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
    with pytest.raises(EngineError, match="the final norm was not applied"):
        check(running, samples([40, 60]), running.frozen(), "float32")


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [16, 4])
def test_workers_code_what_the_codec_codes(running: VllmEngine, bits: int) -> None:
    groups = [samples([17, 5, 60]), samples([9], seed=1), samples([33, 20], seed=2)]
    codec = registry.make(rotated_name(bits, bits))
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    stages: dict[str, float] = {}
    for captured in running.stream(iter(groups), codec):
        assert callable(captured.states)
        coded = captured.states()
        states = [
            {n: a for n, a in coded.arrays.items() if n.startswith(f)} for f in ("aux_", "last_")
        ]
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
    assert stages.keys() == {*STAGES, *FEEDING}
    for g, group in enumerate(groups):
        for i, states in running.capture(group):
            want = to_numpy(codec.encode(*states))
            for arrays in found[g, i]:
                for name, array in ((n, want[n]) for n in arrays):
                    assert array.shape == arrays[name].shape
                    assert (
                        array != arrays[name]
                    ).mean() < 1e-3  # batches of other shapes differ in a last bit
    left = {p.name for p in running._spool.iterdir()}
    told = {"coding.json", "norm.pt", "embedding.pt", "calibration.pt", "worker.lock"}
    assert {"coding.json", "norm.pt", "worker.lock"} <= left <= told, (
        "batches are deleted as they are read"
    )


def test_steps_are_large_where_states_are_small() -> None:
    assert step_tokens(6 * 576 * 2) == 1 << 16
    assert step_tokens(16 << 10) == 1 << 15
    assert step_tokens((16 << 10) + 1) is None
    assert step_tokens(6 * 6144 * 2) is None


def test_the_row_whose_states_are_lost_or_another_s_is_named(tmp_path: Path) -> None:
    engine = VllmEngine.__new__(VllmEngine)
    engine._spool, engine._reader = tmp_path, SpoolReader(tmp_path)
    members = [Member(n, 40 + n, np.array([n, 7], np.int32)) for n in range(3)]
    report_failure(f"{tmp_path}/1", EngineError("not finite"), 2)
    with pytest.raises(EngineError, match=r"states of row 42 are lost: .*not finite.* GB are free"):
        engine._spooled(f"{tmp_path}/1", members)
    counts = {"tokens": torch.tensor([2, 1, 2]), "lasts": torch.zeros(3, dtype=torch.long)}
    told = counts | {"times": torch.zeros(4, dtype=torch.float64)}
    ids = {IDS: torch.tensor([0, 7, 1, 2, 7], dtype=torch.int32)}
    write_batch(f"{tmp_path}/2", to_host({}), ids | told)
    with pytest.raises(
        EngineError, match="other tokens .* for row 41, expected exactly its 2 tokens"
    ):
        engine._spooled(f"{tmp_path}/2", members)
    with pytest.raises(EngineError, match="row 5: its connector was not called"):
        engine._place(5, SimpleNamespace(kv_transfer_params=None))


def test_a_rank_s_partial_sum_is_named() -> None:
    whole = torch.randn(7, 3, 8)
    same_on_ranks(whole, whole.clone(), 1, [2, 9, 28])
    partial = whole.clone()
    partial[:, 1] *= 0.8
    with pytest.raises(
        EngineError,
        match="entering layers 9 are a tensor-parallel rank's partial sum: ranks 0 and 1 differ",
    ):
        same_on_ranks(whole, partial, 1, [2, 9, 28])


def test_older_versions_are_refused_and_newer_ones_tried_with_a_warning() -> None:
    assert check_version("0.25.1") is None
    assert check_version("0.33.0+cpu") is None
    with pytest.raises(EngineError, match="vllm 0.24.0: this release needs 0.25 or later"):
        check_version("0.24.0")
    for newer in ("0.34.1", "1.0.0"):
        assert f"vllm {newer} is newer than 0.33" in str(check_version(newer))


def test_on_a_gpu_the_engine_is_not_forked(
    tiny: Path, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**_: object) -> None:
        raise RuntimeError(os.environ["VLLM_WORKER_MULTIPROC_METHOD"])

    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "to be restored")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    monkeypatch.setattr("dspark.dump.engines.vllm.engine.engine_version", lambda name: "0.26.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("dspark.dump.engines.vllm.launch.gpu_memory", lambda: 1 << 36)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="RuntimeError: spawn"):
        VllmEngine.load(
            str(tiny),
            shapes,
            LAYERS,
            dtype="bfloat16",
            seq_length=8,
            spool=tmp_path / "s",
            batch_tokens=None,
        )


def test_runs_of_a_mask() -> None:
    assert runs(np.array([0, 1, 1, 0, 1], bool)) == [[1, 3], [4, 5]]
    assert runs(np.zeros(3, bool)) == []


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_the_same_store_with_either_engine(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    """Of a Gemma 3, whose states no version of vLLM gives: they are taken at its norms."""
    pytest.importorskip("vllm")
    target = families.save(tmp_path / "gemma3", "gemma3")
    made = samples([40, 33, 17, 60, 9])
    rows = [
        {"input_ids": s.input_ids.tolist(), "loss_mask": s.loss_mask.astype(int).tolist()}
        for s in made
    ]
    data = write_rows(rows)
    stores = []
    for engine in ("transformers", "vllm"):
        output = tmp_path / engine
        code = "from dspark.dump.cli import main; main()"
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                "--model",
                str(target),
                "--data",
                str(data),
                "--output",
                str(output),
                "--engine",
                engine,
                "--seq-length",
                "200",
                "--mask-token-id",
                "250",
                "--aux-bits",
                "16",
                "--last-bits",
                "16",
                "--json",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["samples"] == 5
        stores.append(dspark.cache.open(output))
    told = "states are captured at the norms of vLLM's Gemma3ForCausalLM"
    assert told in done.stderr
    assert "its model class there has no interface for hidden states" in done.stderr
    for i in range(5):
        a, b = stores[0][i], stores[1][i]
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_allclose(a.aux, b.aux, rtol=2**-7, atol=1e-3)
        np.testing.assert_allclose(a.last, b.last, rtol=2**-7, atol=1e-3)
    assert stores[0].manifest.target.weights_sha256 == stores[1].manifest.target.weights_sha256


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_regenerated_states_are_those_of_a_second_pass(running: VllmEngine) -> None:
    """Two turns; the second prompt holds the first answer, whose states come out of vLLM's prefix
    cache.
    """
    codec = registry.make(LOSSLESS)
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=0, max_tokens=20, thinking=None)
    rng = np.random.default_rng(0)
    first = [Ask(i, rng.integers(3, 120, 20 + i).tolist(), 20, i, False) for i in range(4)]
    said = {a.ask.key: a for a in running.answer(first, sampling, [2], codec)}
    assert sorted(said) == [0, 1, 2, 3]
    assert all(a.states is None and a.finished == (a.ids[-1] == 2) for a in said.values())
    second = []
    for key, a in said.items():
        before = [*a.ask.prompt, *a.ids]
        span = (len(a.ask.prompt), len(before))
        second.append(Ask(key, [*before, 5, 6, 7], 20, 100 + key, True, (span,)))
    found = list(running.answer(second, sampling, [2], codec))
    assert len(found) == 4
    assert any(len(a.ids) > 2 for a in found)
    for a in found:
        ids = np.array([*a.ask.prompt, *a.ids], np.int32)
        mask = np.zeros(len(ids), bool)
        for start, stop in [*a.ask.spans, (len(a.ask.prompt), len(ids))]:
            mask[start:stop] = True
        ((_, again),) = running.capture([TokenSample(0, bytes(KEY_BYTES), ids, mask)])
        assert a.states is not None
        aux = torch.from_numpy(a.states.arrays["aux_code"]).view(torch.bfloat16).float()
        torch.testing.assert_close(aux[:-1], again.aux[:-1].float(), rtol=2**-7, atol=2e-3)
        last = torch.from_numpy(a.states.arrays["last_code"]).view(torch.bfloat16).float()
        torch.testing.assert_close(last, again.last.float(), rtol=2**-7, atol=2e-3)
