"""The folder of a run: what lies there is read with care and replaced only when the new run is ready."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark.cache import errors
from dspark.train.folder import read_record


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a":', "is not JSON (Expecting value"),
        (b"\xff\xfe", "is not JSON (.*codec"),
        (b"[1]", "a JSON list"),
        (None, "No such file"),
    ],
)
def test_a_record_that_is_no_record_is_named(tmp_path: Path, content: bytes | None, found: str) -> None:
    path = tmp_path / "training.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.DraftError, match=f"training.json .*{found.replace('(', '[(]')}"):
        read_record(path)


def test_a_record_is_read(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"samples": 3}')
    assert read_record(tmp_path / "store.json") == {"samples": 3}
