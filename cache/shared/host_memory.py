"""The host memory that a process may still take: what the machine has left, and what the limits of
its control groups leave of that (containers, jobs of a scheduler; versions 1 and 2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

WHOLE = Path("/")


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
    for group, names in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # not a group with a limit, or "max"
            found.append(_left(group, names))
    return min(found, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """Yield this process's control groups, from the innermost out: each may have a limit. In a
    container the path may be the host's, of which only the mount itself is there.
    """
    lines = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mount, names = root / "sys/fs/cgroup", V2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", V1
        else:
            continue
        inner = Path(path.lstrip("/"))
        if ".." in inner.parts:  # outside the namespace
            inner = Path()
        for group in (inner, *inner.parents):
            yield mount / group, names


def _left(group: Path, names: _Names) -> int:
    limit, used = (int((group / name).read_text()) for name in (names.limit, names.used))
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    # The kernel drops cached files when memory is short: after a dump they may fill a container.
    return max(0, limit - used + sum(int(stat.get(name, 0)) for name in names.cached))
