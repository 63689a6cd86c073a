"""The weights that bench/learn.py tries, against what they claim to be, and that its variants are
paired and its calls go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stores
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch
from dspark.train.objective.walk import visits

FLAGS = (
    "--recipe none --num-layers 1 --block-size 3 --markov-rank 4 --total-seq-len 128 "
    "--rows-per-step 1 --max-anchors 64 --optimizer muon "
    "--lr 2e-2 --val-fraction 0.3 --no-tensorboard --val-rows 2 --device cpu"
)


@pytest.fixture
def learn(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import learn

    yield learn
    for name in ("learn", "feed", "common"):
        sys.modules.pop(name, None)


def row(size: int) -> tuple[Batch, torch.Tensor]:
    """Two documents with supervised runs, every eligible position an anchor, two blocks of padding;
    random acceptances.
    """
    mask = np.zeros(180, np.bool_)
    mask[5:60] = mask[70:100] = mask[100:160] = True
    doc = np.repeat([0, 1, -1], [100, 65, 15]).astype(np.int32)
    can = rules.eligible(mask, doc)
    batch = Batch.build(
        input_ids=np.arange(180),
        loss_mask=mask,
        doc=doc,
        aux=torch.zeros(180, 1, 4),
        last=torch.zeros(int(can.sum()), 4),
        anchors=np.flatnonzero(can),
        block_size=size,
        pad_anchors_to=int(can.sum()) + 2,
    )
    alpha = (
        torch.rand(batch.counted.shape, generator=torch.Generator().manual_seed(0)) * batch.counted
    )
    return batch, alpha


def test_visits_on_the_device_are_the_walks(learn: Any) -> None:
    batch, alpha = row(4)
    real = int(batch.anchor_valid.sum())
    exact = visits(alpha[:real].double().numpy(), batch.anchors[:real].numpy())
    found = learn.visits_on(alpha, batch)[:real].numpy()
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-6)


def test_slot_factors_are_the_derivatives_of_tau(learn: Any) -> None:
    _, alpha = row(4)
    alpha.clamp_(0.01, 0.99).requires_grad_()
    (1 + alpha.cumprod(1).sum(1)).sum().backward()
    assert alpha.grad is not None
    decay = torch.ones(4)
    torch.testing.assert_close(learn.slot_factors("tau", alpha.detach(), decay), alpha.grad)
    log = alpha.detach().clone().requires_grad_()
    log.log().sum().backward()
    assert log.grad is not None
    torch.testing.assert_close(
        learn.slot_factors("inverse", alpha.detach().clamp(min=0.05), decay), log.grad.clamp(max=20)
    )


def test_variants_are_paired_and_a_second_call_goes_on(learn: Any, tmp_path: Path) -> None:
    stores.write_store(tmp_path / "hs.zarr", [40 + 7 * (i % 9) for i in range(24)])
    args = argparse.Namespace(
        store=tmp_path / "hs.zarr",
        budget=1e9,
        steps=3,
        rows=3,
        seeds="0",
        variants="base,walk",
        also=["again="],
        equal_time=False,
        keep=tmp_path / "kept",
        train=FLAGS,
        name="learn",
        results=tmp_path,
    )
    first = learn.experiment(args, lambda text: None)
    assert [r["name"] for r in first] == ["base", "walk"]
    args.variants = "base,walk,again"
    second = learn.experiment(args, lambda text: None)
    assert second[:2] == first
    assert {k: second[2][k] for k in ("tau", "walk", "accept_rate")} == {
        k: first[0][k] for k in ("tau", "walk", "accept_rate")
    }
    base, again, walk = (
        load_file(tmp_path / "kept" / f"{n}-0" / "model.safetensors")
        for n in ("base", "again", "walk")
    )
    assert all(torch.equal(base[n], again[n]) for n in base)
    assert not torch.equal(base["fc.weight"], walk["fc.weight"])
    args.budget, args.seeds = 0.0, "1"
    assert learn.experiment(args, lambda text: None) == second
    assert "again" in learn.table(second)
