"""Spool files are read once, deleted, and a failed write is an error with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dspark.dump.spool import read_spooled, report_failure


def test_read_once_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    save_file({"hidden_states": torch.ones(2, 3)}, path)
    Path(f"{path}.lock").touch()
    assert torch.equal(read_spooled(str(path))["hidden_states"], torch.ones(2, 3))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_tells_why(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    Path(f"{path}.lock").touch()
    report_failure(str(path), OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="the worker could not write .*No space left on device"):
        read_spooled(str(path))
    assert not list(tmp_path.iterdir())


def test_a_file_that_never_came(tmp_path: Path) -> None:
    Path(f"{tmp_path}/r.safetensors.lock").touch()
    with pytest.raises(OSError, match="left no .*its disk is full"):
        read_spooled(str(tmp_path / "r.safetensors"))
