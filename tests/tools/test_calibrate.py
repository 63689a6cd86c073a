"""Calibration: measures by hand, sequential temperature scaling on a head that is wrong on purpose,
the command on a real store.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import stores
from dspark.tools.judge import calibration as cal
from dspark.tools.judge.calibrate import calibrate_command
from dspark.train.config import TrainConfig
from dspark.train.draft.saved.folder import read_tensors
from dspark.train.loop import train


def records(
    count: int, size: int, temperature: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Acceptances, and logits that would be right if divided by ``temperature``, with noise as a
    real head has.
    """
    g = torch.Generator().manual_seed(seed)
    true = torch.randn(count, size, generator=g) * 1.5 + 0.5
    return true * temperature, torch.sigmoid(true + 0.3 * torch.randn(count, size, generator=g))


def test_measures_by_hand() -> None:
    guess, truth = (
        torch.tensor([0.2, 0.2, 0.9, 0.9], dtype=torch.float64),
        torch.tensor([0.0, 0.2, 1.0, 0.6]),
    )
    # Two bins of two blocks: |0.2 - 0.1| and |0.9 - 0.8|, each half of the blocks.
    assert cal.ece(guess, truth) == pytest.approx(0.1)
    assert cal.brier(torch.tensor([0.5]), torch.tensor([0.3])) == pytest.approx(0.25)
    assert cal.brier(torch.tensor([1.0]), torch.tensor([0.75])) == pytest.approx(0.25)


@pytest.mark.parametrize("wrong", [0.4, 2.5])
def test_scaling_lowers_the_error_of_unseen_blocks_at_every_position(wrong: float) -> None:
    """A head over- or underconfident by a factor: found again, on other blocks than those
    judged.
    """
    fitted, judged = records(4000, 5, wrong, 0), records(4000, 5, wrong, 1)
    scaling = cal.fit(*fitted)
    assert scaling.temperature.tolist() == pytest.approx([wrong] * 5, rel=0.2)
    before, after = (cal.measure(s, *judged)["survival"] for s in (cal.identity(5), scaling))
    assert all(b < 0.6 * a for a, b in zip(before["ece"], after["ece"], strict=True))
    assert all(b < a for a, b in zip(before["brier"], after["brier"], strict=True))
    # Scaling keeps the order within a slot, so its AUROC stays; only ties in a bin differ.
    own = [cal.measure(s, *judged)["slot"]["auroc"] for s in (cal.identity(5), scaling)]
    assert own[0] == pytest.approx(own[1], abs=0.01)
    assert float(cal.fit_shared(*fitted).temperature[0]) == pytest.approx(wrong, rel=0.15)


def test_a_shift_mends_what_no_temperature_can() -> None:
    accept = torch.full((500, 2), 0.3)
    logit = torch.zeros(500, 2)  # says one half, whatever it is divided by
    assert cal.measure(cal.fit(logit, accept), logit, accept)["survival"]["ece"][
        0
    ] == pytest.approx(0.2)
    shifted = cal.fit(logit, accept, shift=True)
    assert max(cal.measure(shifted, logit, accept)["survival"]["ece"]) < 0.02


def test_sweep() -> None:
    """Confidences 0.8, 0.5, 0.5 (survival 0.8, 0.4, 0.2) that are right."""
    accept = torch.tensor([[0.8, 0.5, 0.5]])
    rows = {r["threshold"]: r for r in cal.sweep(cal.identity(3), torch.logit(accept), accept)}
    assert (rows[0.0]["verified"], rows[0.0]["tokens"]) == pytest.approx((3, 1 + 0.8 + 0.4 + 0.2))
    assert (rows[0.3]["verified"], rows[0.3]["tokens"]) == pytest.approx((2, 2.2))
    assert rows[0.3]["accepted_share"] == pytest.approx(0.6)
    assert (rows[0.9]["verified"], rows[0.9]["tokens"], rows[0.9]["accepted_share"]) == (0, 1, 0)


def test_command_writes_beside_and_into_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, draft = tmp_path / "hs.zarr", tmp_path / "draft"
    stores.write_store(store, np.random.default_rng(3).integers(16, 40, 40).tolist())
    train(
        TrainConfig(
            cache=str(store),
            output=str(draft),
            max_steps=6,
            num_layers=1,
            block_size=3,
            markov_rank=8,
            lr=1e-3,
            val_fraction=0.4,
            total_seq_len=256,
            rows_per_step=2,
            device="cpu",
            tensorboard=False,
        )
    )
    before = read_tensors(draft)
    picture = tmp_path / "reliability.svg"
    options = ["--cache", str(store), "--draft", str(draft), "--device", "cpu", "--json"]
    result = CliRunner().invoke(calibrate_command, [*options, "--write", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads((draft / "calibration.json").read_text()) == found
    served = json.loads((draft / "temperatures.json").read_text())
    assert served == {"temperatures": pytest.approx(found["temperature"])}
    assert len(found["temperature"]) == len(found["before"]["survival"]["ece"]) == 3
    assert min(found["blocks"].values()) > 10
    assert picture.read_text().count("<svg") == 1
    assert all(torch.equal(v, before[k]) for k, v in read_tensors(draft).items())

    assert CliRunner().invoke(calibrate_command, [*options, "--fold"]).exit_code == 0
    after = read_tensors(draft)
    temperature = found["shared"]["temperature"][0]
    served = json.loads((draft / "temperatures.json").read_text())
    assert served == {
        "temperatures": pytest.approx([t / temperature for t in found["temperature"]])
    }
    assert {k for k in after if not torch.equal(after[k], before[k])} <= {
        "confidence_head.proj.weight",
        "confidence_head.proj.bias",
    }
    torch.testing.assert_close(
        after["confidence_head.proj.weight"],
        (before["confidence_head.proj.weight"].double() / temperature).bfloat16(),
    )

    # A folder that takes no report is refused before the store is read for one.
    (draft / "calibration.json").unlink()
    (draft / "calibration.json").mkdir()
    monkeypatch.setattr("dspark.tools.judge.calibrate.collect", pytest.fail)
    for flag in ("--write", "--fold"):
        result = CliRunner().invoke(calibrate_command, [*options, flag])
        assert (result.exit_code, json.loads(result.stdout)["exit_code"]) == (2, 2), result.output
        assert "calibration.json exists and is not a file" in result.stderr
    assert all(torch.equal(v, after[k]) for k, v in read_tensors(draft).items())


def test_without_a_confidence_head(tmp_path: Path) -> None:
    store, draft = tmp_path / "hs.zarr", tmp_path / "draft"
    stores.write_store(store, [30] * 12)
    train(
        TrainConfig(
            cache=str(store),
            output=str(draft),
            max_steps=1,
            num_layers=1,
            block_size=3,
            markov_rank=8,
            confidence_head_alpha=0,
            device="cpu",
            tensorboard=False,
        )
    )
    result = CliRunner().invoke(calibrate_command, ["--cache", str(store), "--draft", str(draft)])
    assert result.exit_code == 1
    assert "no confidence head" in result.stderr


def test_the_recommended_threshold_is_the_largest_that_keeps_what_is_gained() -> None:
    from dspark.tools.judge.calibration import recommended

    points = [
        {"threshold": t, "tokens": n}
        for t, n in ((0.0, 2.0), (0.1, 1.99), (0.2, 1.95), (0.3, 1.94), (0.4, 1.0))
    ]
    assert recommended(points) == 0.2
    assert (
        recommended([{"threshold": t, "tokens": 1.0} for t in (0.0, 0.5)]) == 0.5
    )  # nothing is gained: verify nothing
