"""Layers by drafter type: what a store of its own would hold, one store for several, what is
missing.
"""

from __future__ import annotations

import pytest

from dspark.cache.errors import MismatchError
from dspark.cache.target import taps
from dspark.train.draft.types import TYPES


def test_every_type_is_known_here() -> None:
    assert set(taps.READERS) == set(TYPES)


@pytest.mark.parametrize(
    ("kind", "layers", "expected"),
    [
        ("dspark", 36, (1, 9, 17, 25, 33)),
        ("eagle3", 36, (1, 17, 32)),
        ("peagle", 30, (1, 14, 26)),
        ("spd", 47, (14, 30, 46)),
        ("eagle3", 4, (1, 2, 3)),
        ("eagle3", 2, ()),
        ("spd", 2, (0, 1)),
        ("spd", 4, (0, 1, 3)),
    ],
)
def test_a_store_of_its_own(kind: str, layers: int, expected: tuple[int, ...]) -> None:
    assert taps.wanted(kind, layers) == expected


def test_eagle3_and_dspark_share_five_layers() -> None:
    assert taps.serving(["eagle3", "dspark"], 36) == {
        "eagle3": (1, 17, 33),
        "dspark": (1, 9, 17, 25, 33),
    }
    glm = (7, 22, 38, 54, 69)
    assert taps.serving(["peagle", "dspark"], 78, glm) == {"peagle": (7, 38, 69), "dspark": glm}
    assert taps.serving(["eagle3"], 36) == {"eagle3": (1, 17, 32)}


@pytest.mark.parametrize("layers", range(6, 100))
def test_what_serves_them_is_what_eagle3_and_peagle_choose(layers: int) -> None:
    read = taps.serving(["eagle3", "dspark"], layers)
    stored = sorted({i for one in read.values() for i in one})
    assert taps.chosen("eagle3", stored, layers) == read["eagle3"]
    assert taps.chosen("dspark", stored, layers) == read["dspark"] == tuple(stored)
    assert len(set(read["eagle3"])) == 3


def test_nearest_keeps_the_order_and_repeats_none() -> None:
    assert taps.nearest((5, 6, 7, 30), (1, 2, 3)) == (5, 6, 7)
    assert taps.nearest((0, 1, 2, 3), (9, 9, 9)) == (1, 2, 3)


def test_what_a_store_lacks_is_named() -> None:
    with pytest.raises(
        MismatchError, match=r"lacks \[17, 32\] of \[1, 17, 32\].*--layers 1,4,17,32 for both"
    ):
        taps.chosen("eagle3", [1, 4], 36)
    assert taps.chosen("spd", [-1, 4, 9], 36) == (4, 9)
    assert "would also store [32]" in taps.remark("eagle3", (1, 17, 33), (1, 9, 17, 25, 33), 36)
    assert taps.remark("dspark", (3,), (3,), 36) == "layers: dspark reads [3] of the store's [3]"
