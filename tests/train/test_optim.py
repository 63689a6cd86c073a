"""Optimizers beside AdamW: Muon's factors against an SVD, its steps against plain matrices, and
resuming a run that uses them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_trainings import small_training
from torch import nn

from dspark.cache import errors
from dspark.train.config import SCHEDULES, TrainConfig
from dspark.train.loop import train
from dspark.train.optim.adamw import MasterAdamW
from dspark.train.optim.base import AdamSettings, learning_rate
from dspark.train.optim.muon import MasterMuon, is_matrix, orthogonal, owners
from dspark.train.run import checkpoint, memory
from dspark.train.run.setup import prepare

ADAM = AdamSettings(betas=(0.9, 0.95), weight_decay=0.1, clip=1.0)
SHAPES = {
    "fc.weight": (6, 20),
    "layers.0.q.weight": (9, 5),
    "layers.0.k.weight": (5, 9),
    "layers.0.norm.weight": (9,),
    "markov_head.markov_w1.weight": (30, 4),
}


class Stop(Exception):
    """Raised by a progress callback, in place of a crash."""


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small_training(
        tmp_path, [60, 80, 90, 30, 20, 100, 50, 64], max_steps=6, checkpoint_freq=1.0
    )


def named(seed: int) -> list[tuple[str, torch.nn.Parameter]]:
    g = torch.Generator().manual_seed(seed)
    return [(n, torch.nn.Parameter(torch.randn(s, generator=g))) for n, s in SHAPES.items()]


def backward(parameters: list[tuple[str, torch.nn.Parameter]], g: torch.Generator) -> None:
    loss: Any = sum((p * torch.randn(p.shape, generator=g)).sum() for _, p in parameters)
    loss.backward()


def test_newton_schulz_gives_the_orthogonal_factor_but_for_known_singular_values() -> None:
    """It keeps the singular vectors and sends each singular value through the polynomial, all but
    tiny ones to about 1.
    """
    g = torch.Generator().manual_seed(0)
    for rows, columns in ((16, 16), (8, 40)):
        matrices = torch.randn(3, rows, columns, generator=g, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        x = s / s.square().sum(-1, keepdim=True).sqrt()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        found = orthogonal(matrices)
        torch.testing.assert_close(found, (u * x[:, None]) @ vh, atol=1e-6, rtol=0)
        assert x[s > 0.05 * s[:, :1]].min() > 0.6
        assert x.max() < 1.3


def test_muon_steps_are_those_of_plain_matrices_and_leave_the_rest_to_adamw() -> None:
    ours, plain, adam = named(0), dict(named(0)), named(0)
    optimizer, other = MasterMuon(ours, ADAM), MasterAdamW(adam, ADAM)
    momentum = {n: torch.zeros(SHAPES[n]) for n in SHAPES}
    draws = [torch.Generator().manual_seed(1) for _ in range(3)]
    for _ in range(4):
        for parameters, g in zip((ours, list(plain.items()), adam), draws, strict=True):
            backward(parameters, g)
        norm = optimizer.step(0.02)
        torch.testing.assert_close(norm, other.step(0.02), rtol=1e-6, atol=0)  # rows of other lines
        torch.nn.utils.clip_grad_norm_(list(plain.values()), 1.0)
        for n, p in plain.items():
            assert p.grad is not None
            if p.ndim == 2 and "markov" not in n:
                momentum[n] = 0.95 * momentum[n] + p.grad
                ahead = p.grad + 0.95 * momentum[n]
                wide = ahead if p.shape[0] <= p.shape[1] else ahead.T
                factor = orthogonal(wide[None])[0]
                factor = factor if p.shape[0] <= p.shape[1] else factor.T
                p.data = p * (1 - 0.02 * 0.1) - 0.02 * 0.2 * max(p.shape) ** 0.5 * factor
            p.grad = None
    for (n, p), (_, q) in zip(ours, adam, strict=True):
        torch.testing.assert_close(p, plain[n] if is_matrix(n, p) else q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [MasterAdamW, MasterMuon])
def test_a_gradient_lasts_one_step_and_rows_add_up_in_float32(kind: Any) -> None:
    """Parameters of 1,000 and 30 elements, so that there is padding; the second one is not reached
    by the second step.
    """
    g = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(20, 50, generator=g).bfloat16())
    b = nn.Parameter(torch.randn(30, generator=g).bfloat16())
    optimizer = kind([("layers.0.w", w), ("b", b)], ADAM)
    for reached in ([w, b], [w], [b]):
        parts = [[torch.randn(p.shape, generator=g).bfloat16() for p in reached] for _ in range(3)]
        for part in parts:
            sum((p * x).sum() for p, x in zip(reached, part, strict=True)).backward()
        sums = [sum(x.float() for x in xs) for xs in zip(*parts, strict=True)]
        want = torch.stack([x.square().sum() for x in sums]).sum().sqrt()
        torch.testing.assert_close(optimizer.step(1e-3).float(), want, rtol=1e-6, atol=0)
    assert optimizer.snapshot().updates == 3


def test_matrices_are_shared_out_by_what_they_cost() -> None:
    """Costs min^2 max of 4 x 6, 8 x 8, 2 x 9 and two of 4 x 4: 96, 512, 36, 64, 64."""
    shapes = [torch.Size(s) for s in ((4, 6), (8, 8), (9, 2), (4, 4), (4, 4))]
    assert owners(shapes, 1) == [0, 0, 0, 0, 0]
    assert owners(shapes, 2) == [1, 0, 1, 1, 1]
    assert owners(shapes, 3) == [1, 0, 1, 2, 2]


def test_many_matrices_are_orthogonalised_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = named(0), named(0)
    for parameters, together in ((ours, 1 << 28), (other, 1)):
        monkeypatch.setattr("dspark.train.optim.muon.TOGETHER", together)
        optimizer = MasterMuon(parameters, ADAM)
        backward(parameters, torch.Generator().manual_seed(1))
        optimizer.step(0.02)
    for (n, p), (_, q) in zip(ours, other, strict=True):
        torch.testing.assert_close(p, q, msg=n)


def test_a_step_of_muon_is_as_large_as_one_of_adamw() -> None:
    """Root mean square of the first steps, lr 1: AdamW's is 1 per step at first and 0.2 to 0.4
    later, Muon's about 0.2 from the start.
    """
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(64, 256))
    plain = AdamSettings(betas=(0.9, 0.95), weight_decay=0.0, clip=1e9)
    optimizer = MasterMuon([("fc.weight", p)], plain)
    (p * torch.randn(p.shape, generator=g)).sum().backward()
    optimizer.step(1.0)
    assert 0.15 < float(p.detach().square().mean().sqrt()) < 0.25


def test_resuming_equals_not_stopping(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, optimizer="muon")
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    train(whole)

    def stop(step: int, total: int, text: str) -> None:
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        train(config, progress=stop)
    assert checkpoint.found(Path(config.output) / "checkpoints")
    train(config, resume=True)
    ours, theirs = (load_file(Path(c.output) / "model.safetensors") for c in (config, whole))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    plain = dataclasses.replace(config, output=str(tmp_path / "plain"), optimizer="adamw")
    train(plain)
    without = load_file(Path(plain.output) / "model.safetensors")
    assert not all(torch.equal(ours[n], without[n]) for n in without)
    with pytest.raises(errors.MismatchError):
        train(dataclasses.replace(plain, output=config.output), resume=True)


def test_muon_keeps_one_moment(
    config: TrainConfig,
) -> None:
    with pytest.raises(errors.UsageError, match="expected adamw or muon"):
        dataclasses.replace(config, optimizer="sgd")
    with pytest.raises(errors.UsageError, match="betas are"):
        dataclasses.replace(config, betas=(0.9, 1.0))
    run = prepare(dataclasses.replace(config, optimizer="muon"))
    snapshot = run.optimizer.snapshot()
    sizes = sum(t.numel() for tensors in snapshot.moments.values() for t in tensors.values())
    held = sum(t.numel() for t in snapshot.masters.values())
    assert memory.estimate_memory(run).trained == 4 * (2 * held + sizes)
    with pytest.raises(errors.TrainError, match="exp_avg are not"):
        prepare(config).optimizer.load(snapshot)


def test_a_run_of_an_earlier_release_goes_on_if_what_it_set_changed_nothing(
    config: TrainConfig,
) -> None:
    written = config.to_json()
    withdrawn = {"ema": 0.0, "slot_weights": "decay", "noise_std": 0.0}
    assert TrainConfig.from_json(written | withdrawn, "here") == config
    for name, value in {"ema": 0.999, "slot_weights": "dpace", "noise_std": 0.05}.items():
        with pytest.raises(errors.UsageError, match=rf"here: unknown keys \['{name}'\]"):
            TrainConfig.from_json(written | withdrawn | {name: value}, "here")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 and later")
def test_muon_steps_as_torchs() -> None:
    """The same formulas: torch's orthogonalises in bfloat16, here in float32, and nothing else
    differs.
    """
    torch.manual_seed(0)
    first = torch.randn(24, 40)
    ours, theirs = nn.Parameter(first.clone()), nn.Parameter(first.clone())
    flat = MasterMuon(
        [("fc.weight", ours)], AdamSettings(betas=(0.9, 0.95), weight_decay=0.0, clip=math.inf)
    )
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        gradient = torch.randn(24, 40)
        assert ours.grad is not None
        ours.grad.copy_(gradient)
        theirs.grad = gradient.clone()
        flat.step(0.02)
        reference.step()
    off = (ours - theirs).norm() / (theirs - first).norm()
    assert float(off.detach()) < 0.01


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str) -> None:
    rates = [learning_rate(i, 100, 2.0, 0.1, 0.1, schedule) for i in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    middle, end = {
        "cosine": (1.1, 0.2),
        "linear": (1.1, 0.2),
        "wsd": (2.0, 0.2),
        "constant": (2.0, 2.0),
    }[schedule]
    assert rates[55] == pytest.approx(middle)
    assert rates[100] == pytest.approx(end)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[90] == pytest.approx(1.1 if schedule == "wsd" else rates[90])
