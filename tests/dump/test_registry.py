"""A new engine is one module and one line of the registry."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import dspark.cache
from dspark.cache.errors import UsageError
from dspark.dump.config import DumpConfig
from dspark.dump.engines import registry
from dspark.dump.engines.engine import EngineRun
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.engines.hf import start as start_transformers
from dspark.dump.engines.registry import ENGINES, EngineKind, choose_engine, engine_version
from dspark.dump.progress import Display
from dspark.dump.run import dump


class Toy(TransformersEngine):
    """A sample at a time."""

    name = "toy"


def test_a_toy_engine_writes_a_store(
    config: DumpConfig, show: Display, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = ModuleType("toy_engine")
    seen: list[EngineRun] = []

    def start(run: EngineRun) -> Toy:
        seen.append(run)
        inner = start_transformers(run)
        return Toy(inner.model, run.shapes, run.layers, device=run.device, batch_tokens=1)

    module.start = start  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_engine", module)
    monkeypatch.setitem(ENGINES, "toy", EngineKind("toy_engine:start", "numpy", ("numpy",)))
    report = dump(replace(config, engine="toy", output=tmp_path / "toy.zarr"), show)
    assert report["engine"] == "toy"
    assert [run.spool.name for run in seen] == ["toy.zarr.spool"]
    manifest = dspark.cache.open(tmp_path / "toy.zarr").manifest
    assert manifest.dump.engine_version == engine_version("toy")


def test_names_and_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no such engine. Engines: auto, transformers, vllm"):
        choose_engine("sglang", "cpu")
    monkeypatch.setitem(
        ENGINES, "vllm", EngineKind("x:y", "no_such_package", (), 1, "pip install it")
    )
    with pytest.raises(
        UsageError, match="not installed here: pip install it, or use --engine transformers"
    ):
        choose_engine("vllm", "cpu")
    with pytest.raises(UsageError, match="the package is not installed"):
        engine_version("vllm")


@pytest.mark.parametrize(("here", "engine"), [(True, "vllm"), (False, "transformers")])
def test_auto_takes_vllm_on_a_gpu(monkeypatch: pytest.MonkeyPatch, here: bool, engine: str) -> None:
    package = "numpy" if here else "no_such_package"
    monkeypatch.setitem(ENGINES, "vllm", EngineKind("x:y", package, ()))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_engine("auto", "auto") == (engine, "cuda", None)
    assert choose_engine("auto", "cpu") == ("transformers", "cpu", None)
    assert registry.choose_dtype("auto", "cuda") == "bfloat16"
