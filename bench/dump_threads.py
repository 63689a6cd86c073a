"""Seconds of processors that a dump's processes use, by thread: a script's own Python is one
interpreter, and what its threads use together cannot exceed the seconds that pass.

    with Usage() as used:
        dump(config, ...)
    used.seconds  # {"dump": {"main": 3.1, "encode": 2.2, ...}, "vLLM": {...}, "others": {...}}

Threads come and go, so every ``INTERVAL`` seconds the kernel is asked about all of them. What a
thread used before the beginning, and what it uses after the last look at it, is not counted.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType

INTERVAL = 0.5  # a look at some 300 threads takes 30 ms of Python
LEAST = 0.005  # seconds; less is left out


class Usage:
    """Use as a context manager around what is measured, in the dump's own process."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._names: dict[int, tuple[str, str]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="usage", daemon=True)

    def __enter__(self) -> Usage:
        self._look()
        self._first = dict(self._last)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    @property
    def seconds(self) -> dict[str, dict[str, float]]:
        """By process and thread, the largest first."""
        total: dict[str, Counter[str]] = {}
        for tid, seconds in self._last.items():
            process, thread = self._names[tid]
            total.setdefault(process, Counter())[thread] += seconds - self._first.get(tid, 0.0)
        return {
            process: {t: round(s, 2) for t, s in threads.most_common() if s > LEAST}
            for process, threads in total.items()
        }

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        own = {t.native_id: family(t.name) for t in threading.enumerate()}
        for pid in family_of(os.getpid()):
            process = kind_of(pid)
            for tid in numbers(Path(f"/proc/{pid}/task")):
                seconds = used(pid, tid)
                if seconds is None:
                    continue
                self._last[tid] = seconds
                thread = "main" if tid == pid else "other threads"
                if pid == os.getpid():
                    process, thread = "dump", own.get(tid, "not Python's")
                # A new thread's name is known a moment later.
                if self._names.get(tid, ("", "not Python's"))[1] == "not Python's":
                    self._names[tid] = process, thread


def family(name: str) -> str:
    """A thread's name without its number."""
    return "main" if name == "MainThread" else re.sub(r"[-_ ]?\d+( \(|$).*", "", name)


def kind_of(pid: int) -> str:
    """Tell vLLM's processes, which rename themselves, from ours."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "others"
    return "vLLM" if b"VLLM" in line or b"EngineCore" in line else "others"


def family_of(pid: int) -> list[int]:
    """A process, and all that it and these have started."""
    out = [pid]
    for one in out:
        for tid in numbers(Path(f"/proc/{one}/task")):
            try:
                out += map(int, Path(f"/proc/{one}/task/{tid}/children").read_text().split())
            except OSError:
                continue
    return out


def numbers(folder: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(folder)]
    except OSError:
        return []


def used(pid: int, tid: int) -> float | None:
    """Seconds of processors; None if the thread has ended."""
    try:
        return int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        return None
