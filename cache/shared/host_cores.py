"""The cores that a process may use: in a container or a job, fewer than the machine has."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

from dspark.cache.shared.control_groups import WHOLE, groups

OPENMP = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def bound() -> frozenset[int]:
    """Return the numbers of the cores that this process is bound to; all where it is to none, or
    where OpenMP binds threads: to one core each, this one among them, as soon as torch is imported.
    """
    if hasattr(os, "sched_getaffinity") and not any(map(os.environ.get, OPENMP)):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cores(among: frozenset[int] | None = None, *, root: Path = WHOLE) -> int:
    """Return how many cores this process may use: those that it is bound to (``among``: that it and
    others are), and no more than its control groups give it time of, rounded up. ``root``: where
    the system's ``proc`` and ``sys`` are.
    """
    found = [len(bound() if among is None else among)]
    for group, version in groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):  # not a group with a limit, or "max"
            found.append(math.ceil(_quota(group, version)))
    return max(1, min(found))


def _quota(group: Path, version: int) -> float:
    if version == 2:
        time, period = map(int, (group / "cpu.max").read_text().split())
    else:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        time, period = (int((group / name).read_text()) for name in names)
    if time <= 0 or period <= 0:  # -1: no limit
        raise ValueError(time)
    return time / period
