"""The search for a step: its model against measured entropy, and how many measurements it takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dspark.cache.codec.klt.search import (
    NEAREST,
    TOLERANCE,
    gaussian_bits,
    gaussian_step,
    step_for,
)
from dspark.cache.codec.klt.symbols import entropy_columns, quantise

DEVIATIONS = np.logspace(1.5, -1.5, 200)


class Measured:
    """``bits_at`` of a function of what the model says, and how often it was asked."""

    def __init__(self, law: str) -> None:
        self.law, self.times = law, 0

    def __call__(self, step: float) -> float:
        self.times += 1
        bits = gaussian_bits(DEVIATIONS, step)
        if self.law == "steep":
            return float(bits**2.5 / 200**1.5)
        if self.law == "flat":
            return float(bits**0.5 * 200**0.5)
        if self.law == "jump":
            return bits * (1.1 if step < 1.0 else 0.9)
        return 1.15 * bits + 3.0


@pytest.mark.parametrize("step", [0.02, 0.5, 3.0])
def test_model_is_the_entropy_of_rounded_gaussians(step: float) -> None:
    y = torch.randn(50_000, 200, generator=torch.Generator().manual_seed(0))
    y *= torch.from_numpy(DEVIATIONS).float()
    want = float(entropy_columns(quantise(y, step)).sum())
    assert gaussian_bits(DEVIATIONS, step) == pytest.approx(want, rel=0.02)
    assert gaussian_step(DEVIATIONS, gaussian_bits(DEVIATIONS, step)) == pytest.approx(step)


@pytest.mark.parametrize(("law", "most"), [("near", 3), ("steep", 5), ("flat", 6)])
def test_few_measurements_find_a_step(law: str, most: int) -> None:
    for bits in (20.0, 200.0, 900.0):
        measured = Measured(law)
        step = step_for(measured, DEVIATIONS, bits)
        assert measured.times <= most
        assert Measured(law)(step) == pytest.approx(bits, rel=TOLERANCE)


def test_a_jump_ends_the_search() -> None:
    measured = Measured("jump")
    step = step_for(measured, DEVIATIONS, gaussian_bits(DEVIATIONS, 1.0))
    assert abs(math.log(step)) < 2 * NEAREST
    assert measured.times < 20


def test_states_that_never_vary_have_any_step() -> None:
    assert step_for(Measured("near"), np.zeros(3), 5.0) == 1.0
