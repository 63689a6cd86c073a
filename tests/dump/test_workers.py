"""Worker processes: all there before one works, what they start with reaches each of them, and nothing stays behind."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import pytest

from dspark.dump.workers import WorkerPool


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_all_start_with_what_they_are_given(folder: Path) -> None:
    with WorkerPool(2, sys.setrecursionlimit, (4321,)) as pool:
        pool.wait_until_started()
        assert list(folder.iterdir()) == []
        # Nobody was idle before both were there, so both were started.
        assert len(multiprocessing.active_children()) >= 2
        assert {f.result() for f in [pool.submit(sys.getrecursionlimit) for _ in range(8)]} == {4321}


def test_one_that_dies_at_the_start_is_an_error(folder: Path) -> None:
    pool = WorkerPool(2, os._exit, (3,))
    with pytest.raises(Exception, match="terminated abruptly"):
        pool.wait_until_started()
    pool.close()
    assert list(folder.iterdir()) == []
