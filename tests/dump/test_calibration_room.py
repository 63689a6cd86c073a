"""Where states to learn from are kept: on the GPU only with much room to spare."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dspark.cache.codec.klt import pieces
from dspark.cache.codec.registry import make
from dspark.dump import centring

GPU = torch.device("cuda")
SHAPE, TOKENS = (5, 576), 138_240  # SmolLM2's; their states are 956 MB


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """GB that a GPU reports free."""
    left = {"gb": 0.0}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(left["gb"] * 1e9), 0))
    return left


def test_states_are_brought_at_once_if_fitting_has_room_too(free: dict[str, float]) -> None:
    aux, last = torch.zeros(8, 5, 576), torch.zeros(4, 576)
    free["gb"] = 1.0
    assert pieces.room(GPU, *SHAPE) < 0
    assert pieces.resident(aux, last, GPU) == (aux, last)
    assert pieces.resident(aux, last, torch.device("cpu")) == (aux, last)
    free["gb"] = 8.0
    assert 4e9 < pieces.room(GPU, *SHAPE) < 7e9


@pytest.mark.parametrize(("gb", "stay"), [(70.0, True), (9.0, False)])
def test_captured_states_stay_where_half_of_the_gpu_would_do(
    free: dict[str, float], gb: float, stay: bool
) -> None:
    free["gb"] = gb
    there = cast(Any, SimpleNamespace(is_cuda=True, device=GPU, shape=(8, *SHAPE)))
    codec = make("klt-1-1-2")
    assert centring.fit_beside(there, codec, TOKENS, "cuda") is stay
    assert not centring.fit_beside(there, make("rotated-4-4"), TOKENS, "cuda")
    assert not centring.fit_beside(there, codec, TOKENS, "cpu")
    assert not centring.fit_beside(torch.zeros(8, *SHAPE), codec, TOKENS, "cuda")
