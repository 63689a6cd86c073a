"""A Python program in a session of its own, with a limit: what it printed, which stage it was in,
and, where the limit stopped it, where its processes stood. Nothing of it is left running.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES_ENV = "DSPARK_BENCH_STAGES"
STACKS = Path(__file__).with_name("stacks")  # its sitecustomize answers SIGUSR1
TAIL, STACKS_TAIL = 4000, 20_000  # characters that are kept


@dataclass(frozen=True, slots=True)
class Ended:
    """``code`` None: stopped by the limit or by ``stop``. ``stages``: name and the second at which
    it began. ``stood``: processes that ran at the limit; ``stacks``: where their threads stood.
    """

    code: int | None
    seconds: float
    stages: list[dict[str, Any]]
    stood: list[str]
    log: str
    stacks: str

    @property
    def words(self) -> str:
        """How it ended, in a line."""
        at = f" in stage {self.stages[-1]['stage']!r}" if self.stages else ""
        if self.code is None:
            return f"stopped behind {self.seconds:.0f} s{at}"
        return f"exit code {self.code} behind {self.seconds:.0f} s{at}"


def stage(name: str) -> None:
    """Note, in the program itself, that a stage begins. Does nothing where nobody asked."""
    path = os.environ.get(STAGES_ENV)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"stage": name, "at": time.time()}) + "\n")


def run(
    call: Sequence[str],
    log: Path,
    seconds: float,
    *,
    env: dict[str, str] | None = None,
    stop: threading.Event | None = None,
    hear: Callable[[dict[str, Any]], None] = lambda stage: None,
) -> Ended:
    """Run Python on ``call``, all that it prints going to ``log``; ``hear`` gets each stage as it
    begins. ``stop``, once set, is a limit that has come. Ends all that it started even where the
    caller is interrupted.
    """
    path = log.with_suffix(".stages")
    path.unlink(missing_ok=True)
    paths = os.pathsep.join(filter(None, [str(STACKS), os.environ.get("PYTHONPATH")]))
    around = os.environ | (env or {}) | {STAGES_ENV: str(path), "PYTHONPATH": paths}
    began, wall, heard = time.monotonic(), time.time(), 0
    stood: list[str] = []
    before: int | None = None
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *call], stdout=file, stderr=file, env=around, start_new_session=True
        )
    with whole_session(process):
        while process.poll() is None and time.monotonic() - began < seconds:
            if stop is not None and stop.is_set():
                break
            time.sleep(0.2)
            for found in stages_of(path, wall)[heard:]:
                heard += 1
                hear(found)
        if process.poll() is None:
            stood, before = standing(process.pid), log.stat().st_size
            signal_all(process.pid, signal.SIGUSR1)
            time.sleep(2)  # for the stacks to be written
    printed = log.read_bytes()
    return Ended(
        None if stood else process.returncode,
        round(time.monotonic() - began, 1),
        stages_of(path, wall),
        stood,
        short(printed[:before])[-TAIL:],
        "" if before is None else short(printed[before:])[-STACKS_TAIL:],
    )


@contextmanager
def whole_session(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Kill every process of its session at the end, whatever happened."""
    try:
        yield
    finally:
        signal_all(process.pid, signal.SIGKILL)
        process.wait()


def stages_of(path: Path, wall: float) -> list[dict[str, Any]]:
    """Stages so far, with seconds since ``wall``."""
    if not path.is_file():
        return []
    # A line that is being written has no end yet.
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    noted = [json.loads(line) for line in lines]
    return [{"stage": n["stage"], "second": round(n["at"] - wall, 1)} for n in noted]


def session(leader: int) -> list[int]:
    """Ids of the processes whose session began with ``leader``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(folder.name)) == leader:
                found.append(int(folder.name))
    return found


def standing(leader: int) -> list[str]:
    """The session's processes with the CPU seconds that each has used."""
    out = []
    for pid in session(leader):
        with suppress(OSError):
            folder = Path("/proc", str(pid))
            command = short(folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ")).strip()
            fields = folder.joinpath("stat").read_text().rpartition(")")[2].split()
            used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            out.append(f"{used:.0f} s: {command[:200]}")
    return out or ["none that can be read"]


def signal_all(leader: int, number: signal.Signals) -> None:
    for pid in session(leader):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def short(printed: bytes) -> str:
    """As text, without the folders that a module's path begins with."""
    text = printed.decode(errors="replace")
    return re.sub(r"/[^\s\"':]*/(?=(?:vllm|dspark|torch|bench|python3\.\d+)/)", "", text)
