"""Loggers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio. One that is not
installed causes a warning.

A logger takes ``row(name -> number, step)`` and ``close()``. A failure (no network, not logged in)
is reported once and ends that logger, not the training: metrics.jsonl has the numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dspark.cache.errors import first_line


class Logger(Protocol):
    """Receives the metrics of a step."""

    def row(self, values: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in FOLDER/tensorboard."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def row(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class RunOf:
    """Weights & Biases, or Trackio, which has the same calls: a run named like the folder in the
    project ``dspark``.
    """

    def __init__(
        self, module: Any, folder: Path, settings: Mapping[str, Any], **extra: Any
    ) -> None:
        self._run = module.init(
            project="dspark", name=folder.resolve().name, config=dict(settings), **extra
        )
        self._log: Callable[..., Any] = getattr(self._run, "log", None) or module.log
        self._finish: Callable[[], Any] = getattr(self._run, "finish", None) or module.finish

    def row(self, values: Mapping[str, float], step: int) -> None:
        self._log(dict(values), step=step)

    def close(self) -> None:
        self._finish()


class MLflow:
    """A run named like the folder in the experiment ``dspark``, at the tracking address set in the
    environment.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume_step: int) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.set_experiment("dspark")
        self._mlflow.start_run(run_name=folder.resolve().name)
        self._mlflow.log_params(dict(settings))

    def row(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _wandb(folder: Path, settings: Mapping[str, Any], resume_step: int) -> Logger:
    # Its own files go into the draft's folder, not into the working folder.
    return RunOf(importlib.import_module("wandb"), folder, settings, dir=str(folder))


def _trackio(folder: Path, settings: Mapping[str, Any], resume_step: int) -> Logger:
    return RunOf(importlib.import_module("trackio"), folder, settings)


STARTED: dict[str, Callable[[Path, Mapping[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "mlflow": MLflow,
    "trackio": _trackio,
}


class Loggers:
    """The loggers ``names`` of a run in ``folder``; ``warn`` is called for each that cannot log."""

    def __init__(
        self,
        names: tuple[str, ...],
        folder: Path,
        settings: Mapping[str, Any],
        resume_step: int,
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._open: dict[str, Logger] = {}
        for name in names:
            self._try(name, lambda name=name: self._begin(name, folder, settings, resume_step))  # type: ignore[misc]

    def _begin(
        self, name: str, folder: Path, settings: Mapping[str, Any], resume_step: int
    ) -> None:
        self._open[name] = STARTED[name](folder, settings, resume_step)

    def row(self, data: Mapping[str, Any]) -> None:
        """Log the numbers of a row of metrics.jsonl; a list becomes one number per element."""
        prefix = "validation" if data.get("validation") else "train"
        values = {}
        for key, value in data.items():
            parts = (
                {f"{key}/{i}": v for i, v in enumerate(value)}
                if isinstance(value, list)
                else {key: value}
            )
            for name, number in parts.items():
                if isinstance(number, int | float) and not isinstance(number, bool):
                    values[f"{prefix}/{name}"] = float(number)
        for name, logger in list(self._open.items()):
            self._try(name, lambda logger=logger: logger.row(values, int(data["step"])))  # type: ignore[misc]

    def close(self) -> None:
        for name, logger in list(self._open.items()):
            self._try(name, logger.close)

    def _try(self, name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except ImportError:
            self._warn(
                f"--logger {name}: not installed (pip install {name}); the metrics are in "
                "metrics.jsonl"
            )
        # Each of these packages has its own errors, and none of them may end a training.
        except Exception as error:
            self._open.pop(name, None)
            self._warn(
                f"--logger {name}: {first_line(error)}; logging there stops; the metrics are in "
                "metrics.jsonl"
            )
