"""What a text repeats, against a search that compares ids."""

from __future__ import annotations

import numpy as np

from dspark.cache.files.layout import STATE_CHUNK
from dspark.cache.records import TokenSample, last_rows
from dspark.cache.repeats import LONG, SHORT, Repeats


def searched(samples: list[TokenSample], length: int, stored: bool) -> float:
    """The share by comparing every run with all before it in its chunk."""
    runs = [
        tuple(sample.input_ids[max(0, t + 1 - length) : t + 1].tolist())
        for sample in samples
        for t in np.flatnonzero(last_rows(sample.loss_mask) | (not stored))
    ]
    again = 0
    for begin in range(0, len(runs), STATE_CHUNK):
        chunk = runs[begin : begin + STATE_CHUNK]
        again += sum(run in chunk[:i] for i, run in enumerate(chunk))
    return again / len(runs)


def test_repeats_are_those_that_a_search_finds() -> None:
    rng = np.random.default_rng(3)
    samples = []
    for row, length in enumerate((5, 400, 90, 90, 300)):
        ids = rng.integers(0, 9, length)
        if row == 1:
            ids[100:] = np.resize(ids[100:107], 300)  # an answer in a loop
        if row == 3:
            ids[:70] = samples[2].input_ids[:70]  # a prompt that another sample has
        mask = np.arange(length) % 5 > 1
        samples.append(TokenSample(row, bytes(16), ids.astype(np.int32), mask))
    found = Repeats.of(samples)
    assert found == (
        searched(samples, SHORT, False),
        searched(samples, LONG, False),
        searched(samples, LONG, True),
    )
    assert 0.1 < found.long < found.short
    assert Repeats.of([]) == (0, 0, 0)
