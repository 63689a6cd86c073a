"""``history.json`` beside a draft: what it started from, and every session that trained it.
Distinguishes interrupted, resumed and warm-started runs, for people and for the model card.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DraftError, MismatchError, Stopped
from dspark.cache.files.atomic import write_file
from dspark.train.run.folder import read_record

if TYPE_CHECKING:
    from dspark.train.run.setup import Run

HISTORY = "history.json"
# How a session ended. A killed session could not record it, and keeps the first value.
RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"


def same_start(output: Path, run: Run) -> None:
    """Raise MismatchError if the run in ``output`` started from other weights than ``--init-from``
    holds now.
    """
    path = output / HISTORY
    if run.start is None or not path.is_file():
        return
    then = (_read(path)["start"] or {}).get("weights_sha256")
    if then != run.start.weights_sha256:
        raise MismatchError(
            f"{output} started from weights {str(then)[:12]}, but {run.config.init_from} now "
            f"holds {run.start.weights_sha256[:12]}: that draft was changed. Restore it, "
            "or use another --output."
        )


@contextmanager
def session(output: Path, run: Run, step: int, *, resumed: bool) -> Iterator[Session]:
    """Record a session from ``step`` on. KeyboardInterrupt and errors are recorded and
    propagate.
    """
    path = output / HISTORY
    before = _read(path)["sessions"] if resumed and path.is_file() else []
    start = None if run.start is None else run.start.to_json()
    now = Session(path, start, before, step)
    now.write(RUNNING)
    try:
        yield now
    except (KeyboardInterrupt, Stopped):
        now.write(INTERRUPTED)
        raise
    except BaseException:
        now.write(FAILED)
        raise
    now.write(FINISHED)


def _read(path: Path) -> dict[str, Any]:
    """``start`` (an object or None) and ``sessions`` (a list). Raises DraftError for a file of
    another shape; what single sessions say is for who prints them.
    """
    found = read_record(path)
    start, sessions = found.get("start"), found.get("sessions", [])
    if not isinstance(start, dict | None) or not isinstance(sessions, list):
        raise DraftError(
            f"{path}: start is {type(start).__name__} and sessions {type(sessions).__name__}; "
            "expected an object or null, and a list, as dspark-train wrote them: restore the file, "
            "or delete it (a training goes on without what came before)."
        )
    return {"start": start, "sessions": sessions}


class Session:
    """The current session; ``reached`` is the last step with a complete checkpoint."""

    def __init__(
        self, path: Path, start: dict[str, Any] | None, before: list[Any], step: int
    ) -> None:
        self.path, self.start, self.before = path, start, before
        self.began = self.reached = step

    def saved(self, step: int) -> None:
        """Record that the checkpoint of ``step`` is complete."""
        self.reached = step
        self.write(RUNNING)

    def write(self, ended: str) -> None:
        own = {"from_step": self.began, "to_step": self.reached, "ended": ended}
        record = {"start": self.start, "sessions": [*self.before, own]}
        write_file(self.path, (json.dumps(record, indent=1) + "\n").encode())


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Return a history as sentences: how it started, and how it was trained."""
    start, sessions = record.get("start"), record.get("sessions") or []
    out = ["Started from random weights."]
    if start:
        out = [
            f"Warm start: {start['taken']} tensors of {start['folder']} (weights sha256 "
            f"{start['weights_sha256'][:12]})."
        ]
        out += [f"Changed: {name}, {how}." for name, how in start["changed"].items()]
        out += [f"Not taken: {name} ({why})." for name, why in start["left"].items()]
        out += [f"Begun anew: {name} ({how})." for name, how in start["begun"].items()]
    for number, one in enumerate(sessions):
        verb = "Trained" if number == 0 else "Resumed"
        ended = "still running, or killed" if one["ended"] == RUNNING else one["ended"]
        out.append(f"{verb} from step {one['from_step']} to step {one['to_step']}: {ended}.")
    return out
