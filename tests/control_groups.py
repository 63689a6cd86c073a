"""A machine's ``proc`` and ``sys``, in a folder."""

from __future__ import annotations

from pathlib import Path


def system(root: Path, own: str, groups: dict[str, dict[str, str]]) -> Path:
    """A machine with 9 KB left, whose process is in groups ``own`` of those mounted."""
    for path, text in {"proc/meminfo": "MemFree: 1 kB\nMemAvailable:    9 kB\n",
                       "proc/self/cgroup": own}.items():  # fmt: skip
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    for group, files in groups.items():
        (root / "sys/fs/cgroup" / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / "sys/fs/cgroup" / group / name).write_text(text + "\n")
    return root
