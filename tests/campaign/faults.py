"""Faults at a chosen call of the system: a process that dies there, or an error that comes once.

Patched in the process itself, so a case costs what the work costs, and every rename, fsync and
deletion is met, not only those that a clock happens to hit.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspark.cache.files import atomic
from dspark.cache.parts import shard_writer

# What changes the disk: each is a moment before and a moment after.
WRITES = [
    (os, "replace"),
    (os, "rename"),
    (os, "fsync"),
    (os, "link"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "mkdir"),
    (atomic, "_renameat2"),
]


class Deaths:
    """Counts moments around the calls in ``WRITES``; at moment ``at`` the process is killed as by
    kill -9.
    """

    def __init__(self, at: int | None) -> None:
        self.at, self.moments = at, 0

    def _moment(self) -> None:
        if self.moments == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.moments += 1

    def install(self) -> None:
        """For the rest of this process's life."""
        for module, name in WRITES:
            real = getattr(module, name)

            def call(*args: Any, real: Callable[..., Any] = real, **more: Any) -> Any:
                self._moment()
                out = real(*args, **more)
                self._moment()
                return out

            setattr(module, name, call)


def attempt(work: Callable[[], Any], at: int | None, said: Path) -> int:
    """Do ``work`` in a fork of this process that dies at moment ``at``; its exit code (-9: killed,
    1: ``said`` has the error, 0: ``said`` has the moments).
    """
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        shard_writer._pool.cache_clear()  # its threads are the parent's
        deaths = Deaths(at)
        try:
            deaths.install()
            work()
        except BaseException as error:
            said.write_text(f"{type(error).__name__}: {error}")
            os._exit(1)
        said.write_text(str(deaths.moments))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(root: Path) -> dict[str, bytes]:
    """Every file below ``root`` by its path."""
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def copied(source: Path, to: Path) -> Path:
    """``to`` as a copy of ``source``."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(source, to, symlinks=True)
    return to


@contextmanager
def bounded(gigabytes: float) -> Iterator[None]:
    """At most that much more memory for this process (of addresses) while the block runs."""
    import resource

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + int(gigabytes * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def kept(path: Path, name: str) -> str:
    """A copy of ``path`` that outlives the campaign; where it is, for a finding's text."""
    to = Path(tempfile.mkdtemp(prefix="campaign-")) / name
    if path.is_dir():
        shutil.copytree(path, to, symlinks=True)
    return str(to)


def note(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
