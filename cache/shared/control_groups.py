"""The control groups that a process is in (containers, jobs of a scheduler; versions 1 and 2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

WHOLE = Path("/")


def groups(controller: str, root: Path = WHOLE) -> Iterator[tuple[Path, int]]:
    """Yield the folders of this process's groups that may limit ``controller`` (memory, cpu), from
    the innermost out, each with its version. In a container the path may be the host's, of which
    only the mount itself is there. ``root``: where the system's ``proc`` and ``sys`` are.
    """
    lines = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mount, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            mount, version = root / "sys/fs/cgroup" / controller, 1
        else:
            continue
        inner = Path(path.lstrip("/"))
        if ".." in inner.parts:  # outside the namespace
            inner = Path()
        for group in (inner, *inner.parents):
            yield mount / group, version
