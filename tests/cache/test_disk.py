"""A disk that refuses: the same error whichever library wrote, and nothing half-written left
beside.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import stores
from dspark.cache.errors import StoreWriteError
from dspark.cache.files.atomic import STAGING, error_number, write_errors, write_file
from dspark.cache.writer import StoreWriter


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses longer files (EFBIG), as a full disk refuses blocks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_do_not_fit_are_one_sentence_and_leave_nothing(tmp_path: Path) -> None:
    with (
        files_of_at_most(2000),
        pytest.raises(
            StoreWriteError, match=r"hs.zarr could not be written: .*File too large.*--resume"
        ),
    ):
        StoreWriter.create(tmp_path / "hs.zarr", stores.manifest(), stores.frozen(), {})
    assert list(tmp_path.iterdir()) == []


def test_a_staged_folder_of_tensors_is_deleted(tmp_path: Path) -> None:
    """As a checkpoint is written: staged beside, by safetensors."""
    final = tmp_path / "step_00000001"
    staged = tmp_path / (STAGING + final.name)
    with (
        files_of_at_most(2000),
        pytest.raises(StoreWriteError, match="File too large"),
        write_errors(final),
    ):
        staged.mkdir()
        save_file({"small": torch.zeros(10)}, staged / "optimizer.safetensors")
        save_file({"large": torch.zeros(1000)}, staged / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_fit_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "zarr.json"
    write_file(path, b"old")
    with files_of_at_most(2000), pytest.raises(StoreWriteError, match="File too large"):
        write_file(path, bytes(3000))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("zarr.json", b"old")]


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space '
        'left on device" })',
    ],
)
def test_a_full_disk_is_known_in_the_words_of_old_and_new_safetensors(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(StoreWriteError, match="the disk is full"), write_errors(tmp_path / "x"):
        raise SafetensorError(text)


def test_tensors_that_cannot_be_stored_are_no_disk_error(tmp_path: Path) -> None:
    error = SafetensorError("Error while serializing: invalid shape")
    assert error_number(error) is None
    with pytest.raises(SafetensorError, match="invalid shape"), write_errors(tmp_path / "x"):
        raise error
