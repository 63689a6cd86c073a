"""Subsets: exactly the chosen samples, with the codes that they had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dspark.cache
from dspark.cache.errors import DataError, ExistsError, UsageError
from dspark.cache.stores.subset import condition, subset
from dspark.cache.stores.verify import verify
from stores import write_store

LENGTHS = [30, 40, 50, 60, 20, 30, 44, 9, 80, 33]


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        (["tokens<=40"], [0, 1, 4, 5, 7, 9]),
        (["tokens>=40", "tokens<=50"], [1, 2, 6]),
        (["supervised>=30"], [3, 8]),
        (["rows=2-4"], [2, 3, 4]),
        (["source=0", "rows=0-0"], [0]),
        (["source=rows"], list(range(10))),
        (["share=1"], list(range(10))),
    ],
)
def test_what_is_chosen_is_there(tmp_path: Path, conditions: list[str], kept: list[int]) -> None:
    write_store(tmp_path / "a.zarr", LENGTHS)
    made = subset(tmp_path / "a.zarr", tmp_path / "b.zarr", conditions)
    assert verify(tmp_path / "b.zarr").ok
    a, b = dspark.cache.open(tmp_path / "a.zarr"), dspark.cache.open(tmp_path / "b.zarr")
    assert made.digest() == a.manifest.digest()
    assert len(b) == len(kept)
    for new, old in enumerate(kept):
        x, y = a.read(old), b.read(new)
        assert (y.tokens.row, y.tokens.key) == (new, x.tokens.key)
        assert all(np.array_equal(x.states[n], y.states[n]) for n in x.states)
    assert all(word in b.manifest.sources[0].id for word in conditions)


def test_a_share_is_of_conversations_and_the_same_every_time(tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", [9] * 60)
    halves = []
    for name, text in (("b", "share=0.5"), ("c", "share=0.5"), ("d", "share=.5:7")):
        subset(tmp_path / "a.zarr", tmp_path / name, [text])
        halves.append(
            {key.tobytes() for key in dspark.cache.open(tmp_path / name).index["sample_key"]}
        )
    assert halves[0] == halves[1] != halves[2]
    assert 15 < len(halves[0]) < 45


@pytest.mark.parametrize(
    "text", ["tokens<5", "share=1.5", "share=", "rows=1", "conversation=ab", "source=", "x"]
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--where"):
        condition(text)


def test_refusals(tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", LENGTHS)
    with pytest.raises(DataError, match="none of its 10 samples"):
        subset(tmp_path / "a.zarr", tmp_path / "b.zarr", ["tokens>=500"])
    with pytest.raises(UsageError, match="0 = rows"):
        subset(tmp_path / "a.zarr", tmp_path / "b.zarr", ["source=other"])
    with pytest.raises(ExistsError):
        subset(tmp_path / "a.zarr", tmp_path / "a.zarr", ["share=1"])
    assert not (tmp_path / "b.zarr").exists()
