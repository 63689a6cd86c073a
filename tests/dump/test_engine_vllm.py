"""Real vLLM against transformers: same ids, same states. One start for the engine, one for the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import dspark.cache
from dspark.cache.errors import EngineError
from dspark.dump.engine_transformers import TransformersEngine
from dspark.dump.engine_vllm import VllmEngine, extracted_ids, waves
from dspark.dump.selfcheck import check
from dspark.dump.target import load_target
from dump_targets import chat, samples

if TYPE_CHECKING:
    from dspark.dump.layers import Shapes

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
    assert not list(running._spool.iterdir()), "spool files are deleted as they are read"


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
def test_a_write_that_fails_in_the_worker_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from dspark.dump.spool import read_spooled
    from dspark.dump.vllm_connector import SpoolConnector, _Copied

    path = tmp_path / "r.safetensors"
    (tmp_path / "r.safetensors.part").mkdir()
    Path(f"{path}.lock").touch()
    with pytest.raises(Exception):  # noqa: B017 - safetensors' own kind
        SpoolConnector._write_tensors({"hidden_states": torch.ones(1)}, _Copied(), str(path), None)
    (tmp_path / "r.safetensors.part").rmdir()
    with pytest.raises(OSError, match="the worker could not write"):
        read_spooled(str(path))


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
