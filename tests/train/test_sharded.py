"""FSDP2 over one process: the rows of a step add up as they do unsharded, in float32, and weights
are gathered and summed once per step.

What several ranks make of it is test_ranks.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from core_cases import small_batch, small_draft
from dspark.train.data.batch import Batch
from dspark.train.distributed import World
from dspark.train.draft.layers import Attention, Mlp
from dspark.train.draft.model import DraftModel
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import Denominators, SlotInputs
from dspark.train.optim.adamw import MasterAdamW
from dspark.train.optim.base import AdamSettings, Optimizer, Snapshot
from dspark.train.optim.fsdp2 import ShardedOptimizer

SETTINGS = AdamSettings(betas=(0.0, 0.95), weight_decay=0.1, clip=1e9)
BATCHES = [small_batch(seed) for seed in range(6)]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def draft(dtype: torch.dtype) -> DraftModel:
    torch.manual_seed(0)
    return small_draft().to(dtype)


def learn(model: DraftModel, batch: Batch) -> None:
    states = model(batch, model.plan(batch))
    out = objective(
        SlotInputs.gather(batch, states, 4.0),
        model.frozen_head,
        ObjectiveConfig(),
        Denominators(9, 9, 9),
    )
    out.loss.backward()  # type: ignore[no-untyped-call]


def gradients(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Of the update just made with a first beta of 0 and no clipping: the first moments are the
    gradients.
    """
    return dict(optimizer.snapshot().moments["exp_avg"])


def step(model: DraftModel, optimizer: Optimizer, batches: list[Batch]) -> dict[str, torch.Tensor]:
    for batch in batches:
        if batch is batches[-1]:
            optimizer.last_row()
        learn(model, batch)
    optimizer.step(0.0)
    return gradients(optimizer)


def sharded(dtype: torch.dtype) -> tuple[DraftModel, ShardedOptimizer]:
    model = draft(dtype)
    return model, ShardedOptimizer(model, SETTINGS, World(), dtype)


def test_gradients_of_a_step_s_rows_are_those_of_the_plain_optimizer() -> None:
    plain = draft(torch.float32)
    want = step(plain, MasterAdamW(plain.trained(), SETTINGS), BATCHES)
    got = step(*sharded(torch.float32), BATCHES)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6)


def test_bfloat16_gradients_of_rows_are_added_up_in_float32() -> None:
    model, optimizer = sharded(torch.bfloat16)
    each = [step(model, optimizer, [batch]) for batch in BATCHES]
    rounded = 0
    for name, gradient in step(model, optimizer, BATCHES).items():
        want = each[0][name]
        for one in each[1:]:
            want = want + one[name]
        torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-9)
        rounded += int((want != want.bfloat16().float()).sum())
    assert rounded > 1000  # sums that bfloat16 does not hold


def test_weights_are_whole_from_the_first_row_to_the_last_and_sums_made_once() -> None:
    model, optimizer = sharded(torch.bfloat16)
    weights = {"fc": model.fc, "layer": model.layers[1].mlp.down_proj}

    def cut() -> list[bool]:
        return [isinstance(module.weight, DTensor) for module in weights.values()]

    for _ in range(2):
        assert all(cut())
        for batch in BATCHES[:2]:
            learn(model, batch)
            assert not any(cut())
            assert all(p.grad is None for p in optimizer.parameters.values())
        optimizer.last_row()
        learn(model, BATCHES[2])
        assert all(cut())
        assert all(
            p.grad is not None and p.grad.dtype == torch.float32
            for p in optimizer.parameters.values()
        )
        before = optimizer.snapshot().masters["fc.weight"]
        optimizer.step(1e-2)
        assert all(p.grad is None for p in optimizer.parameters.values())
        # The next step's rows see the new masters.
        learn(model, BATCHES[0])
        now = optimizer.snapshot().masters["fc.weight"]
        assert not torch.equal(before, now)
        torch.testing.assert_close(model.fc.weight.detach(), now.bfloat16(), rtol=0, atol=0)
        optimizer.last_row()
        learn(model, BATCHES[0])
        optimizer.step(1e-2)


def test_loaded_masters_replace_weights_that_a_validation_gathered() -> None:
    model, optimizer = sharded(torch.float32)
    saved = optimizer.snapshot()
    sizes = [t.nbytes for kind in (saved.masters, *saved.moments.values()) for t in kind.values()]
    assert optimizer.snapshot_bytes() == sum(sizes)
    assert optimizer.finite()
    with torch.no_grad():
        model(BATCHES[0], model.plan(BATCHES[0]))
    other = Snapshot({n: t + 1 for n, t in saved.masters.items()}, saved.moments, 3)
    optimizer.load(other)
    learn(model, BATCHES[0])
    torch.testing.assert_close(model.fc.weight.detach(), other.masters["fc.weight"])


def test_copies_of_weights_that_share_a_product_follow_their_masters() -> None:
    model, optimizer = sharded(torch.bfloat16)
    parts = [m for m in model.layers.modules() if isinstance(m, Attention | Mlp)]
    assert len(parts) == 4

    def follow() -> None:
        """While weights are whole: after a row that is not the last."""
        learn(model, BATCHES[0])
        for module in parts:
            assert module.joint is not None
            assert torch.equal(module.joint, torch.cat(module.joined))

    for _ in range(2):
        follow()
        seen = [module.joint.clone() for module in parts if module.joint is not None]
        optimizer.last_row()
        learn(model, BATCHES[1])
        optimizer.step(1e-2)
        follow()
        now = [module.joint for module in parts if module.joint is not None]
        assert not any(torch.equal(a, b) for a, b in zip(seen, now, strict=True))
    saved = optimizer.snapshot()
    optimizer.load(Snapshot({n: t + 1 for n, t in saved.masters.items()}, saved.moments, 3))
    follow()
