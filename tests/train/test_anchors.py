"""Anchor and slot rules against tables written by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from dspark.cache.records import last_rows
from dspark.train.data import anchors as rules


def bits(text: str) -> npt.NDArray[np.bool_]:
    return np.array([c == "1" for c in text.replace(" ", "")])


def docs(text: str) -> npt.NDArray[np.int32]:
    return np.array([-1 if c == "." else int(c) for c in text.replace(" ", "")], dtype=np.int32)


@pytest.mark.parametrize(
    ("mask", "doc", "expected"),
    [
        # the last of a run is no anchor: its first label is unsupervised
        ("0111011", "0000000", "0110010"),
        ("1111111", "0001111", "1101110"),  # p+1 in the next document
        ("11111", "000..", "11000"),  # padding is no label
        ("11111", "00...", "10000"),  # two padding tokens are not a document
        ("1", "0", "0"),
        ("00000", "00000", "00000"),
    ],
)
def test_eligible(mask: str, doc: str, expected: str) -> None:
    assert rules.eligible(bits(mask), docs(doc)).tolist() == bits(expected).tolist()


def test_eligible_is_what_the_store_keeps_of_each_document() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random(n) < 0.7 for n in (9, 1, 14)]
    doc = np.repeat(np.arange(3, dtype=np.int32), [9, 1, 14])
    expected = np.concatenate([last_rows(m) for m in masks])
    assert rules.eligible(np.concatenate(masks), doc).tolist() == expected.tolist()


def test_last_index_numbers_the_stored_rows() -> None:
    assert rules.last_index(bits("0111011"), docs("0000000")).tolist() == [-1, 0, 1, -1, -1, 2, -1]


def test_positions_restart() -> None:
    assert rules.positions(docs("000 1111 ..")).tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert rules.positions(docs("")).tolist() == []


def test_choose_takes_the_highest_priorities_in_order() -> None:
    can = bits("1011101")
    priority = np.array([0.5, 9.0, 0.1, 0.9, 0.4, 9.0, 0.6])
    assert rules.choose(can, priority, 3).tolist() == [0, 3, 6]
    assert rules.choose(can, priority, 0).tolist() == [0, 2, 3, 4, 6]
    assert rules.choose(can, priority, 50).tolist() == [0, 2, 3, 4, 6]
    assert rules.choose(can, np.zeros(7), 2).tolist() == [0, 2]
    with pytest.raises(ValueError, match="max_anchors"):
        rules.choose(can, priority, -1)


def test_choose_is_uniform_when_priorities_are() -> None:
    rng = np.random.default_rng(3)
    can = np.ones(10, dtype=np.bool_)
    counts = np.zeros(10)
    for _ in range(4000):
        counts[rules.choose(can, rng.random(10), 3)] += 1
    # 1200 each expected, standard deviation 29.
    assert counts.sum() == 12000
    assert np.abs(counts - 1200).max() < 150


@pytest.mark.parametrize(
    ("mask", "doc", "anchor", "label", "counted"),
    [
        ("1111111", "0000000", 1, [2, 3, 4], "111"),
        ("1111111", "0000000", 5, [6, 6, 6], "100"),  # end of the row: shortened, index clamped
        ("1111111", "0000111", 2, [3, 4, 5], "100"),  # end of the document
        # a gap stops the block though label 5 is supervised
        ("1111011", "0000000", 2, [3, 4, 5], "100"),
        ("11111..", "00000..", 3, [4, 5, 6], "100"),  # padding behind
        ("0000000", "0000000", 3, [4, 5, 6], "000"),
    ],
)
def test_slots(mask: str, doc: str, anchor: int, label: list[int], counted: str) -> None:
    index, counts = rules.slots(np.array([anchor]), bits(mask), docs(doc), 3)
    assert index.tolist() == [label]
    assert counts.tolist() == [bits(counted).tolist()]


def test_slots_against_a_loop() -> None:
    rng = np.random.default_rng(5)
    mask = rng.random(60) < 0.8
    doc = np.repeat(np.array([0, 1, 2, -1], dtype=np.int32), [20, 7, 28, 5])
    at = np.flatnonzero(rules.eligible(mask, doc)).astype(np.int64)
    _, counted = rules.slots(at, mask, doc, 6)
    for row, a in enumerate(at):
        going = True
        for k in range(6):
            p = a + k + 1
            going = going and p < 60 and bool(mask[p]) and doc[p] == doc[a]
            assert bool(counted[row, k]) == going
    assert counted[:, 0].all()


def test_no_anchors() -> None:
    index, counted = rules.slots(np.zeros(0, dtype=np.int64), bits("11"), docs("00"), 3)
    assert index.shape == counted.shape == (0, 3)
