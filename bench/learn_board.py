"""Work that several processes share through a folder: each job is claimed by one, and its result is
a file that all read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Board:
    """A folder of claims and results. A claim of a process that no longer runs does not count."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def get(self, key: str) -> Any:
        """The result, or None."""
        path = self._file(key)
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, key: str, value: Any) -> None:
        """Write the result, whole or not at all."""
        part = self.folder / f".{key}.{os.getpid()}"
        part.write_text(json.dumps(value, indent=1) + "\n")
        part.replace(self._file(key))

    def claim(self, key: str) -> bool:
        """Take the job, unless it is done or another process has it."""
        if self._file(key).exists():
            return False
        path = self.folder / f"{key}.claim"
        try:
            with path.open("x") as file:
                file.write(str(os.getpid()))
            return True
        except FileExistsError:
            said = path.read_text()
        if not said or alive(int(said)):
            return False
        path.unlink(missing_ok=True)
        return self.claim(key)

    def release(self, key: str) -> None:
        """Give a claimed job back."""
        (self.folder / f"{key}.claim").unlink(missing_ok=True)

    def arrive(self, at: str) -> None:
        """Tell that this process is at a place."""
        self.put(f"{at}.{os.getpid()}", True)

    def await_all(self, at: str, *, of: str, wait: float) -> bool:
        """Wait until every running process that was at ``of`` is at ``at``; False if one is not in
        ``wait`` seconds.
        """
        until = time.monotonic() + wait
        while True:
            pids = [path.stem.rpartition(".")[2] for path in self.folder.glob(f"{of}.*.json")]
            if all(self.get(f"{at}.{pid}") or not alive(int(pid)) for pid in pids):
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.2)

    def once(self, key: str, make: Callable[[], Any], *, wait: float = 300.0) -> Any:
        """The result; made here unless another process makes it."""
        until = time.monotonic() + wait
        while (found := self.get(key)) is None:
            if self.claim(key):
                self.put(key, make())
            elif time.monotonic() > until:
                raise SystemExit(f"{self.folder}: {key} was claimed and did not come in {wait} s")
            else:
                time.sleep(0.2)
        return found


def alive(pid: int) -> bool:
    """Tell whether a process of this machine runs."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
