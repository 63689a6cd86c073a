"""Loggers beside metrics.jsonl: what they are told, and that one which is absent or fails ends
nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspark.cache.errors import UsageError
from dspark.train.config import LOGGERS, TrainConfig
from dspark.train.run.loggers import STARTED, Loggers

ROW = {
    "step": 3,
    "loss": 1.5,
    "accept_rate": [0.5, 0.25],
    "epoch": 0,
    "note": "x",
    "validation": True,
}


def test_every_name_starts_something_and_another_is_refused() -> None:
    assert set(STARTED) == set(LOGGERS)
    with pytest.raises(UsageError, match="--logger foo: expected tensorboard"):
        TrainConfig(cache="x", logger=("foo",))
    config = TrainConfig(cache="x", logger=("wandb", "tensorboard"))
    assert config.loggers == ("tensorboard", "wandb")
    assert TrainConfig.from_json(config.to_json(), "here") == config
    for odd in ({"logger": [["wandb"]]}, {"seed": "x"}, {"init_from": [1]}, {"epochs": True}):
        with pytest.raises(UsageError, match=rf"here: {next(iter(odd))} is"):
            TrainConfig.from_json(config.to_json() | odd, "here")


class Spy:
    """As much of wandb's, trackio's and mlflow's interface as we call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self if name == "init" else None

        return call


@pytest.mark.parametrize(
    ("name", "logs", "ends"),
    [
        ("wandb", "log", "finish"),
        ("trackio", "log", "finish"),
        ("mlflow", "log_metrics", "end_run"),
    ],
)
def test_a_logger_gets_numbers_with_their_step(
    name: str, logs: str, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy()
    monkeypatch.setitem(sys.modules, name, spy)
    loggers = Loggers((name,), tmp_path / "run7", {"lr": 0.1}, 0, pytest.fail)
    loggers.row(ROW)
    loggers.close()
    assert any("run7" in str(call) for call in spy.calls)
    (found,) = [(args, kwargs) for called, args, kwargs in spy.calls if called == logs]
    expected = {"loss": 1.5, "accept_rate/0": 0.5, "accept_rate/1": 0.25, "epoch": 0.0, "step": 3.0}
    assert found == (({f"validation/{k}": v for k, v in expected.items()},), {"step": 3})
    assert spy.calls[-1][0] == ends


def test_an_absent_or_failing_logger_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "mlflow", None)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no network\nand more")

    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(init=lambda **k: SimpleNamespace(log=broken, finish=broken)),
    )
    loggers = Loggers(("mlflow", "wandb"), tmp_path, {}, 0, said.append)
    for _ in range(3):
        loggers.row(ROW)
    loggers.close()
    assert len(said) == 2
    assert "--logger mlflow: not installed" in said[0]
    assert said[1].startswith("--logger wandb: no network; logging there stops")


def test_tensorboard_writes_its_files(tmp_path: Path) -> None:
    loggers = Loggers(("tensorboard",), tmp_path, {}, 0, pytest.fail)
    loggers.row(ROW)
    loggers.close()
    assert list((tmp_path / "tensorboard").glob("events*"))
