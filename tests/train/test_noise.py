"""Noise on the aux states: where it lies, what decides it, and that validation has none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import stores
from core_cases import small_batch
from dspark.cache import errors
from dspark.train.config import TrainConfig
from dspark.train.loop import train
from dspark.train.noise import noisy


def test_noise_is_uniform_and_the_key_decides_it() -> None:
    batch = small_batch(0)
    a, b = noisy(batch, 0.5, 1, 2, 3), noisy(batch, 0.5, 1, 2, 3)
    difference = a.aux - batch.aux
    assert torch.equal(a.aux, b.aux)
    assert 0.45 < float(difference.abs().max()) <= 0.5 + 1e-6
    assert abs(float(difference.mean())) < 0.05
    assert float(difference.std()) == pytest.approx(0.5 / 3**0.5, rel=0.1)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(noisy(batch, 0.5, *other).aux, a.aux)
    for field in dataclasses.fields(batch):
        if field.name != "aux":
            assert getattr(a, field.name) is getattr(batch, field.name)


def test_training_has_noise_and_validation_none(tmp_path: Path) -> None:
    stores.write_store(tmp_path / "hs.zarr", [60, 80, 90, 30, 20, 100, 50, 64])
    quiet = TrainConfig(
        cache=str(tmp_path / "hs.zarr"), output=str(tmp_path / "quiet"), max_steps=1, num_layers=1, block_size=3, markov_rank=4,
        total_seq_len=256, rows_per_step=1, max_anchors=16, log_every=1, val_fraction=0.2, tensorboard=False, lr=1e-12,
    )  # fmt: skip
    loud = dataclasses.replace(quiet, output=str(tmp_path / "loud"), noise_std=2.0)
    found = []
    for config in (quiet, loud):
        train(config)
        found.append([json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()])  # fmt: skip
    (a, held_out_a), (b, held_out_b) = found
    assert a["loss"] != b["loss"]
    assert held_out_a["ce_loss"] == pytest.approx(held_out_b["ce_loss"], rel=1e-6)
    with pytest.raises(errors.UsageError, match="noise_std is -1"):
        dataclasses.replace(quiet, noise_std=-1)
