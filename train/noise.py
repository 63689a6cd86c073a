"""Noise on the aux states while training: a draft should not lean on digits that another engine, precision or code rounds otherwise.

What speculators calls ``--noise-std``: each element gets a uniform draw from (-S, S), so S is the half-width and S / sqrt(3) the deviation,
whatever the size of the layer's states. The targets' last states and validation stay exact.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dspark.train.batch import Batch


def noisy(batch: Batch, width: float, *key: int) -> Batch:
    """``batch`` with noise of half-width ``width`` on its aux states, a pure function of ``key`` (seed, step, row of the step)."""
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in key]).generate_state(1, np.uint64)
    generator = torch.Generator(batch.aux.device).manual_seed(int(state[0]) >> 1)
    noise = torch.empty_like(batch.aux).uniform_(-width, width, generator=generator)
    return replace(batch, aux=batch.aux + noise)
