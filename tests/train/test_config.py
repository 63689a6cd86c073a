"""Settings: each numeric one has a range, and nothing outside it gets past the config."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from dspark.cache import errors
from dspark.train.compute import choose_compute
from dspark.train.config import NUMBERS, TrainConfig

NUMERIC = {"int", "float", "int | None", "float | None"}


def test_every_number_has_a_range() -> None:
    fields = {f.name for f in dataclasses.fields(TrainConfig) if f.type in NUMERIC}
    assert fields == set(NUMBERS)


@pytest.mark.parametrize("name", sorted(NUMBERS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "3", True, [1]])
def test_what_is_no_number_is_refused_everywhere(name: str, value: Any) -> None:
    if value == math.inf and name in ("grad_clip", "decay"):  # no clipping, no decay
        assert getattr(TrainConfig(cache="", **{name: value}), name) == value
        return
    with pytest.raises(errors.UsageError, match=f"^{name} is ") as raised:
        TrainConfig(cache="", **{name: value})
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("epochs", [0.1, 3, 1e9], [0, -1.0, 1e10]),
        ("max_steps", [None, 1], [0, -1, 1.5]),
        ("lr", [1e-9, 1], [0.0, -1e-3, None]),
        ("min_lr_ratio", [0, 0.5], [1.0, -0.1]),
        ("warmup_ratio", [0, 0.5], [1.0, -0.1]),
        ("weight_decay", [0, 0.1], [-0.1]),
        ("grad_clip", [1e30, math.inf], [0.0, -1.0, -math.inf]),
        ("total_seq_len", [None, 1], [0, -5, 4096.5]),
        ("rows_per_step", [1], [0, 1.5]),
        ("max_anchors", [0, 1], [-1, 1.5]),
        ("num_layers", [1], [0]),
        ("block_size", [1], [0]),
        ("markov_rank", [0, 4], [-1]),
        ("draft_vocab_size", [None, 1], [0, -1]),
        ("confidence_head_alpha", [0, 1.0], [-1.0]),
        ("decay", [0.1, math.inf], [0.0]),
        ("val_fraction", [0.0, 0.99], [1.0, -0.01]),
        ("val_rows", [1], [0]),
        ("checkpoint_freq", [0.25, 1e9], [0.0, 1e300]),
        ("keep_checkpoints", [1], [0]),
        ("seed", [0, -1, 2**32 - 1], [2**32, -(2**32), 0.5]),
        ("workers", [None, 0, 8], [-1, 1.5]),
        ("log_every", [1], [0]),
    ],
)
def test_the_ends_of_the_ranges(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(TrainConfig(cache="", **{name: value}), name) == value
    for value in bad:
        with pytest.raises(errors.UsageError, match=f"^{name} is "):
            TrainConfig(cache="", **{name: value})


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 1.0), (math.nan, 0.9), ("a", 0.9), 0.9])
def test_betas(betas: Any) -> None:
    with pytest.raises(errors.UsageError, match="^betas are "):
        TrainConfig(cache="", betas=betas)


@pytest.mark.parametrize("device", ["foo", "cudax", "cuda:", "cuda:-1", "meta", "", "cpu:0"])
def test_an_unknown_device_is_refused_in_a_sentence(device: str) -> None:
    with pytest.raises(
        errors.UsageError, match=f"^--device {device}: expected auto, cpu, cuda or cuda:N$"
    ):
        choose_compute(device, "auto", None)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_compute("auto", "auto", None).device == torch.device("cpu")
    with pytest.raises(errors.UsageError, match="^--device cuda:0: torch sees no CUDA device"):
        choose_compute("cuda:0", "auto", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = list[torch.device]()  # where Triton starts its kernels
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_compute("cuda:1", "auto", None).device == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]
    with pytest.raises(errors.UsageError, match="^--device cuda:2: torch sees 2 CUDA devices"):
        choose_compute("cuda:2", "auto", None)


@pytest.mark.parametrize("output", ["s3://bucket/draft", "file:///tmp/draft", "s3:/bucket/draft"])
def test_a_draft_is_not_written_to_a_folder_that_looks_like_a_url(output: str) -> None:
    with pytest.raises(errors.UsageError, match="--output .*: expected a local path"):
        TrainConfig(cache="", output=output)
