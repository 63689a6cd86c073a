"""The host memory that a process may still take: what the machine has left, and what the limits of
its control groups leave of that.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from dspark.cache.shared.control_groups import WHOLE, groups


class _Names(NamedTuple):
    """Files of a control group, and the lines of ``memory.stat`` that count cached files."""

    limit: str
    used: str
    cached: tuple[str, ...]


V1 = _Names(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)
V2 = _Names("memory.max", "memory.current", ("active_file", "inactive_file"))


def available(root: Path = WHOLE) -> int | None:
    """Return the bytes of host memory that a process may still take; None if the system does not
    tell. ``root``: where its ``proc`` and ``sys`` are.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = (root / "proc/meminfo").read_text()
        found.append(1024 * int(text.split("MemAvailable:")[1].split()[0]))
    for group, version in groups("memory", root):
        with contextlib.suppress(OSError, ValueError):  # not a group with a limit, or "max"
            found.append(_left(group, V1 if version == 1 else V2))
    return min(found, default=None)


def _left(group: Path, names: _Names) -> int:
    limit, used = (int((group / name).read_text()) for name in (names.limit, names.used))
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    # The kernel drops cached files when memory is short: after a dump they may fill a container.
    return max(0, limit - used + sum(int(stat.get(name, 0)) for name in names.cached))
