"""Fixtures: tiny targets and corpora."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dump_runs import corpus

from dspark.dump.config import DumpConfig
from dspark.dump.progress import Display
from dump_targets import build_tokenizer, save_target


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target folder: random Qwen3, 6 layers, hidden 64."""
    return save_target(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return path

    return write


@pytest.fixture
def config(tiny: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> DumpConfig:
    data = write_rows(corpus(40))
    return DumpConfig(
        model=str(tiny),
        data=str(data),
        output=tmp_path / "hs.zarr",
        part_tokens=300,
        aux_bits=16,
        last_bits=16,
    )


@pytest.fixture
def show() -> Display:
    return Display()
