"""What is computed for all samples of a batch at once, against a step per sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark.cache.codec.base import tokens_of
from dspark.cache.codec.klt.codec import Known, _same_first
from dspark.cache.codec.state_errors import StateError, check_finite
from dspark.cache.parts.arrays import join_tokens
from dspark.cache.records import Array, TokenSample, last_rows
from dspark.dump.engines.hf import padded
from dspark.dump.writing.places import SharedArrays, attach


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


def test_exact_rows_of_first_tokens() -> None:
    """Each stands for the first one with the same id; the others for themselves."""
    rng = np.random.default_rng(3)
    made = samples([3, 2, 5, 1, 4, 2, 2, 3])
    for sample in made:
        sample.input_ids[0] = rng.integers(0, 3)
    tokens = tokens_of(made, torch.zeros(99, 4))
    starts, ids = tokens.sample_start.tolist(), tokens.input_ids.tolist()
    for exact in ([], list(range(22)), [1, 3, 5, 6, 10, 11, 15, 19], [0, 3, 10]):
        want, seen = [], {}
        for token in exact:
            first = seen.setdefault(ids[token], token) if token in starts else token
            want.append(first)
        found = _same_first(torch.tensor(exact, dtype=torch.int64), Known.of(tokens))
        assert found.tolist() == want


def test_a_job_s_arrays_in_shared_memory() -> None:
    arrays: dict[str, Array] = {
        "ids": np.arange(7, dtype=np.int32),
        "none": np.zeros((0, 3), np.uint16),
        "mask": np.array([True, False, True]),
        "keys": np.arange(32, dtype=np.uint8).reshape(2, 16),
    }
    shared = SharedArrays(arrays)
    found = attach(shared.handle(), shared.places)
    shared.close()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_not_finite_in_either_field(bad: float, dtype: torch.dtype) -> None:
    aux, last = torch.zeros(5, 2, 3, dtype=dtype), torch.zeros(4, 3, dtype=dtype)
    aux[0, 0, 0], last[0, 1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    check_finite(aux, last, aux[:0])
    last[2, 1] = bad
    with pytest.raises(StateError, match=r"token 2 \(last state\), channel 1"):
        check_finite(aux, last)
    aux[3, 1, 2] = aux[4, 0, 0] = bad
    with pytest.raises(StateError, match="token 3, aux layer index 1, channel 2"):
        check_finite(aux, last)
