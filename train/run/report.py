"""Where a run's metrics go: ``metrics.jsonl`` (one object per line), a log file, loggers. Resuming
drops what came after the checkpoint.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from dspark.cache.files.atomic import write_file
from dspark.train.run.folder import METRICS
from dspark.train.run.loggers import Loggers
from dspark.train.run.metrics_file import read_metrics

REMEDY = "expected an object with its step. Fix or remove the line, then --resume."


class RunLog:
    """``row()`` appends to metrics.jsonl, the log and the loggers."""

    def __init__(self, folder: Path, resume_step: int, loggers: Loggers | None = None) -> None:
        self.path = folder / METRICS
        self.log = logging.getLogger("dspark.train")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        for old in list(self.log.handlers):
            self.log.removeHandler(old)
            old.close()
        handler = logging.FileHandler(folder / "train.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.log.addHandler(handler)
        kept = [
            json.dumps(row)
            for _, row in read_metrics(folder, growing=True, remedy=REMEDY)
            if row["step"] <= resume_step  # later ones are redone
        ]
        write_file(self.path, "".join(f"{line}\n" for line in kept).encode())
        self.file = open(self.path, "a")  # noqa: SIM115 - closed by close()
        self.loggers = loggers

    def row(self, data: dict[str, Any]) -> None:
        self.file.write(json.dumps(data) + "\n")
        self.file.flush()
        self.log.info(" ".join(f"{k}={_short(v)}" for k, v in data.items()))
        if self.loggers:
            self.loggers.row(data)

    def close(self) -> None:
        self.file.close()
        if self.loggers:
            self.loggers.close()
        for handler in list(self.log.handlers):
            self.log.removeHandler(handler)
            handler.close()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return "[" + ",".join(_short(v) for v in value) + "]"
    return str(value)
