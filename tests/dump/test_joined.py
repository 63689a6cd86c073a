"""What is computed for all samples of a batch at once, against a step per sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark.cache.codec.base import tokens_of
from dspark.cache.parts.arrays import join_tokens
from dspark.cache.records import TokenSample, last_rows
from dspark.dump.engines.hf import padded


def samples(lengths: list[int]) -> list[TokenSample]:
    rng = np.random.default_rng(len(lengths))
    return [
        TokenSample(row, bytes(16), rng.integers(0, 99, n).astype(np.int32), rng.random(n) < 0.7)
        for row, n in enumerate(lengths)
    ]


CASES = [[1], [2, 1, 1], [5, 3, 5], [7, 7], [1, 30, 2, 9, 1]]


@pytest.mark.parametrize("lengths", [*CASES, [0, 3, 0, 0, 2, 0]])
def test_last_states_of_a_part(lengths: list[int]) -> None:
    made = samples(lengths)
    arrays, stored = join_tokens(made)
    assert stored == [int(last_rows(s.loss_mask).sum()) for s in made]
    assert arrays["sample_last_start"].tolist() == np.cumsum([0, *stored]).tolist()
    assert arrays["sample_last_start"].dtype == arrays["sample_start"].dtype == np.int64


def test_a_part_without_samples() -> None:
    arrays, stored = join_tokens([])
    assert stored == []
    assert arrays["sample_last_start"].tolist() == arrays["sample_start"].tolist() == [0]


@pytest.mark.parametrize("lengths", CASES)
def test_tokens_of_a_batch(lengths: list[int]) -> None:
    made = samples(lengths)
    tokens = tokens_of(made, torch.zeros(99, 4))
    where = np.flatnonzero(np.concatenate([last_rows(s.loss_mask) for s in made]))
    assert tokens.last_token.tolist() == where.tolist()
    assert tokens.input_ids.tolist() == [int(t) for s in made for t in s.input_ids]
    assert tokens.sample_start.tolist() == np.cumsum([0, *lengths]).tolist()


@pytest.mark.parametrize("lengths", CASES)
def test_places_of_a_padded_batch(lengths: list[int]) -> None:
    places, width, start = padded(samples(lengths))
    assert width == max(lengths)
    assert places.tolist() == [i * width + t for i, n in enumerate(lengths) for t in range(n)]
    assert start.tolist() == np.cumsum([0, *lengths]).tolist()
